// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Chooses the Debian mirror of the build root: the one of this machine's own apt sources.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

/// Overrides what is found.
pub(crate) const VARIABLE: &str = "KVMMEM_DEBIAN_MIRROR";

/// The mirror's URI.
pub(crate) fn find() -> Result<String> {
    let given = std::env::var(VARIABLE).ok().filter(|mirror| !mirror.is_empty());
    given.or_else(|| from_apt(Path::new("/etc/apt"))).with_context(|| {
        format!(
            "no Debian mirror among this machine's apt sources: set {VARIABLE} to the URI of one"
        )
    })
}

/// The first Debian mirror of `sources.list`, then of `sources.list.d/*`.
fn from_apt(apt: &Path) -> Option<String> {
    let mut files = vec![apt.join("sources.list")];
    let mut more: Vec<_> = fs::read_dir(apt.join("sources.list.d"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    more.sort();
    files.extend(more);
    files.iter().find_map(|path| {
        let text = fs::read_to_string(path).ok()?;
        match path.extension()?.to_str()? {
            "list" => text.lines().find_map(from_line),
            "sources" => text.split("\n\n").find_map(from_stanza),
            _ => None,
        }
    })
}

/// `deb [options] URI suite components` (sources.list(5)).
fn from_line(line: &str) -> Option<String> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let rest = if rest.starts_with('[') { rest.split_once(']')?.1 } else { rest };
    let mut words = rest.split_ascii_whitespace();
    debian(words.next()?, words.next()?)
}

/// A deb822 stanza.
fn from_stanza(stanza: &str) -> Option<String> {
    let field = |name: &str| {
        stanza.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    };
    if field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no")) {
        return None;
    }
    if !field("Types")?.split(' ').any(|kind| kind == "deb") {
        return None;
    }
    let suite = field("Suites")?.split(' ').next()?;
    field("URIs")?.split(' ').find_map(|uri| debian(uri, suite))
}

/// Whether it is a mirror of Debian's main archive: only those end in `/debian`; updates for
/// security do not.
fn debian(uri: &str, suite: &str) -> Option<String> {
    let uri = uri.trim_end_matches('/');
    let fits =
        (uri.starts_with("http://") || uri.starts_with("https://") || uri.starts_with("file:"))
            && uri.ends_with("/debian")
            && !suite.contains("security");
    fits.then(|| uri.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let mirror = Some("http://mirror.example/debian".to_owned());
        assert_eq!(from_line("deb http://mirror.example/debian/ trixie main"), mirror);
        assert_eq!(
            from_line("deb [arch=amd64 signed-by=/k] http://mirror.example/debian trixie main"),
            mirror
        );
        assert_eq!(from_line("# deb http://mirror.example/debian trixie main"), None);
        assert_eq!(from_line("deb-src http://mirror.example/debian trixie main"), None);
        assert_eq!(
            from_line("deb http://mirror.example/debian-security trixie-security main"),
            None
        );
        assert_eq!(from_line("deb http://mirror.example/ubuntu noble main"), None);
        assert_eq!(from_line("deb"), None);
    }

    #[test]
    fn the_first_debian_mirror_of_the_files_is_taken() {
        let apt = tempfile::tempdir().unwrap();
        let folder = apt.path().join("sources.list.d");
        fs::create_dir(&folder).unwrap();
        assert_eq!(from_apt(apt.path()), None);
        fs::write(folder.join("a.list"), "deb https://other.example/tools stable main\n").unwrap();
        fs::write(
            folder.join("debian.sources"),
            "Types: deb\nURIs: http://old.example/debian\nSuites: bookworm\nEnabled: no\n\n\
             Types: deb deb-src\n# why\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n",
        )
        .unwrap();
        assert_eq!(from_apt(apt.path()), Some("http://mirror.example/debian".to_owned()));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Chooses the Debian kernel: the newest release with all packages in one version.

use anyhow::{Result, bail};

/// Oldest kernel series that the module supports.
const OLDEST: (u32, u32) = (7, 3);

/// Series beyond this one are another major version.
const MAJOR: u32 = 7;

/// Flavour with the fewest drivers.
const FLAVOUR: &str = "-cloud-amd64";

/// A kernel whose packages fit each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Release {
    /// As `uname -r` gives it.
    pub(crate) name: String,
    /// The packages' version.
    pub(crate) version: String,
    /// As in `linux-source-7.3`.
    pub(crate) series: String,
}

impl Release {
    pub(crate) fn source(&self) -> String {
        format!("linux-source-{}", self.series)
    }

    pub(crate) fn headers(&self) -> String {
        format!("linux-headers-{}", self.name)
    }

    /// The packages with the image and with the modules.
    pub(crate) fn images(&self) -> [String; 2] {
        [format!("linux-binary-{}", self.name), format!("linux-modules-{}", self.name)]
    }

    /// What `uname -r` has beyond the kernel's own version, such as `+deb13-cloud-amd64`.
    pub(crate) fn local_version(&self, kernel_version: &str) -> Result<&str> {
        match self.name.strip_prefix(kernel_version) {
            Some(rest) => Ok(rest),
            None => bail!(
                "release {} does not begin with its source's version {kernel_version}",
                self.name
            ),
        }
    }
}

/// A package as `apt-cache show` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    name: String,
    version: String,
}

/// Reads `apt-cache show`'s stanzas.
pub(crate) fn parse(stanzas: &str) -> Vec<Package> {
    stanzas
        .split("\n\n")
        .filter_map(|stanza| {
            let field =
                |name| stanza.lines().find_map(|line: &str| line.strip_prefix(name)).map(str::trim);
            Some(Package {
                name: field("Package:")?.to_owned(),
                version: field("Version:")?.to_owned(),
            })
        })
        .collect()
}

/// The newest release with source, headers, image and modules of one version.
pub(crate) fn newest(packages: &[Package]) -> Result<Release> {
    let has = |name: &str, version: &str| {
        packages.iter().any(|one| one.name == name && one.version == version)
    };
    let mut seen = Vec::new();
    let mut complete: Vec<(Vec<u32>, Release)> = Vec::new();
    for source in packages {
        let Some(series) =
            source.name.strip_prefix("linux-source-").filter(|series| is_supported(series))
        else {
            continue;
        };
        for headers in packages.iter().filter(|one| one.version == source.version) {
            let name = match headers.name.strip_prefix("linux-headers-") {
                Some(name) if name.ends_with(FLAVOUR) && starts_with_series(name, series) => name,
                _ => continue,
            };
            let release = Release {
                name: name.to_owned(),
                version: source.version.clone(),
                series: series.to_owned(),
            };
            if release.images().iter().all(|image| has(image, &release.version)) {
                complete.push((numbers(&release.version), release));
            }
        }
        seen.push(format!("{} {}", source.name, source.version));
    }
    complete.sort_by(|(one, _), (other, _)| one.cmp(other));
    match complete.pop() {
        Some((_, release)) => Ok(release),
        None if seen.is_empty() => {
            bail!(
                "Debian offers no kernel source of {}.{} or later for the test bed",
                OLDEST.0,
                OLDEST.1
            )
        }
        None => bail!(
            "no kernel of {}.{} or later has source, {FLAVOUR} headers, image and modules of one version just now; \
             its mirror may be between two uploads: try again later. Sources seen: {}",
            OLDEST.0,
            OLDEST.1,
            seen.join(", ")
        ),
    }
}

fn is_supported(series: &str) -> bool {
    let Some((major, minor)) = series.split_once('.') else { return false };
    match (major.parse(), minor.parse()) {
        (Ok(major), Ok(minor)) => (major, minor) >= OLDEST && major == MAJOR,
        _ => false,
    }
}

fn starts_with_series(name: &str, series: &str) -> bool {
    name.strip_prefix(series).is_some_and(|rest| rest.starts_with(['.', '+', '-']))
}

/// The numbers of a version, which order the versions of one source.
fn numbers(version: &str) -> Vec<u32> {
    version
        .split(|one: char| !one.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str) -> Package {
        Package { name: name.to_owned(), version: version.to_owned() }
    }

    fn kernel(release: &str, series: &str, version: &str) -> Vec<Package> {
        ["linux-headers-", "linux-binary-", "linux-modules-"]
            .iter()
            .map(|kind| package(&format!("{kind}{release}"), version))
            .chain([package(&format!("linux-source-{series}"), version)])
            .collect()
    }

    #[test]
    fn the_newest_complete_release_is_taken() {
        let mut packages = kernel("7.3.4+deb13-cloud-amd64", "7.3", "7.3.4-1~bpo13+1");
        packages.extend(kernel("7.3.10+deb13-cloud-amd64", "7.3", "7.3.10-1~bpo13+1"));
        packages.extend(kernel("7.2.13+deb13-cloud-amd64", "7.2", "7.2.13-1~bpo13+1"));
        packages.push(package("linux-source-7.4", "7.4.1-1~bpo13+1"));
        packages.push(package("linux-headers-7.4.1+deb13-cloud-amd64", "7.4.1-1~bpo13+1"));
        let release = newest(&packages).unwrap();
        assert_eq!(release.name, "7.3.10+deb13-cloud-amd64");
        assert_eq!(release.source(), "linux-source-7.3");
        assert_eq!(release.local_version("7.3.10").unwrap(), "+deb13-cloud-amd64");
        assert!(release.local_version("7.3.4").is_err());
    }

    #[test]
    fn parts_of_different_versions_are_refused_and_named() {
        let mut packages = kernel("7.3.4+deb13-cloud-amd64", "7.3", "7.3.4-1~bpo13+1");
        packages.retain(|one| !one.name.starts_with("linux-source"));
        packages.push(package("linux-source-7.3", "7.3.5-1~bpo13+1"));
        let error = newest(&packages).unwrap_err().to_string();
        assert!(error.contains("linux-source-7.3 7.3.5-1~bpo13+1"), "{error}");
    }

    #[test]
    fn old_series_and_other_flavours_do_not_count() {
        assert!(newest(&kernel("7.2.13+deb13-cloud-amd64", "7.2", "7.2.13-1")).is_err());
        assert!(newest(&kernel("7.3.4+deb13-amd64", "7.3", "7.3.4-1")).is_err());
        assert!(newest(&kernel("8.0.1+deb13-cloud-amd64", "8.0", "8.0.1-1")).is_err());
    }

    #[test]
    fn stanzas_are_read() {
        let text = "Package: a\nSource: b (9)\nVersion: 1-2\nDescription: x\n\nPackage: c\nVersion: 3\n\nPackage: d\n";
        assert_eq!(parse(text), [package("a", "1-2"), package("c", "3")]);
    }
}

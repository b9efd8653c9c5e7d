// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checks that `unsafe` is only in `kvmmem-sys` and `kernel/sys/`.

use std::path::Path;

use anyhow::Result;

use crate::tree;

/// Where Rust code is.
const FOLDERS: [&str; 4] = ["crates", "kernel", "tests", "xtask"];

/// Where it may be unsafe.
const ALLOWED: [&str; 2] = ["crates/kvmmem-sys", "kernel/sys"];

/// What breaks the rule under `root`: each place, or each program and library that does not deny
/// unsafe code.
pub(crate) fn unsafe_code(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for folder in FOLDERS {
        for (path, text) in tree::files(root, folder, &["rs"])? {
            if ALLOWED.iter().any(|allowed| path.starts_with(allowed)) {
                continue;
            }
            let shown = path.display();
            found.extend(places(&text).map(|line| format!("{shown}:{line}: unsafe code")));
            if is_crate_root(&path) && !text.contains("#![deny(unsafe_code)]") {
                found.push(format!("{shown}: lacks #![deny(unsafe_code)]"));
            }
        }
    }
    Ok(found)
}

fn is_crate_root(path: &Path) -> bool {
    let in_source = path.parent().is_some_and(|folder| folder.ends_with("src"));
    in_source && path.file_name().is_some_and(|name| name == "lib.rs" || name == "main.rs")
}

/// The lines with unsafe code; comments and strings may speak of it.
fn places(text: &str) -> impl Iterator<Item = usize> {
    const FORMS: [&str; 6] =
        ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe trait", "#[unsafe("];
    text.lines().enumerate().filter_map(|(index, line)| {
        let code = line.split("//").next().unwrap_or(line).trim();
        let found = FORMS.iter().flat_map(|form| code.match_indices(form)).any(|(at, _)| {
            let before = code.get(..at).unwrap_or_default();
            let in_string = before.matches('"').count() % 2 == 1;
            !in_string && !before.ends_with(|one: char| one.is_alphanumeric() || one == '_')
        });
        (found || code == "unsafe").then_some(index + 1)
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_keyword_is_seen_and_its_mention_is_not() {
        let seen = |line: &str| places(line).count() == 1;
        for line in [
            "let x = unsafe { y };",
            "unsafe impl Send for X {}",
            "pub unsafe fn f() {}",
            "unsafe",
            "#[unsafe(no_mangle)]",
            "unsafe extern \"C\" {",
        ] {
            assert!(seen(line), "{line}");
        }
        for line in
            ["// unsafe { }", "#[allow(unsafe_code)]", "let not_unsafe = 1;", "\"unsafe code\""]
        {
            assert!(!seen(line), "{line}");
        }
    }

    #[test]
    fn this_project_keeps_the_rule() {
        assert_eq!(unsafe_code(crate::project::root()).unwrap(), [""; 0]);
    }

    #[test]
    fn code_outside_the_allowed_places_is_named() {
        let root = tempfile::tempdir().unwrap();
        for folder in FOLDERS {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("crates/kvmmem-sys/src/lib.rs", "unsafe fn f() {}\n");
        write("crates/a/src/lib.rs", "#![deny(unsafe_code)]\nfn g() { unsafe { f() } }\n");
        write("tests/b/src/main.rs", "fn main() {}\n");
        let found = unsafe_code(root.path()).unwrap();
        assert_eq!(
            found,
            [
                "crates/a/src/lib.rs:2: unsafe code",
                "tests/b/src/main.rs: lacks #![deny(unsafe_code)]"
            ]
        );
    }
}

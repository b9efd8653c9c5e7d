// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changed files of the checkout, mapped to the packages that `cargo xtask check` lints and tests.
//!
//! A file belongs to the package with the innermost folder around it. Files outside of all
//! packages are in [`OUTSIDE`] if a package's tests read them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::project;
use crate::tool::Tool;
use crate::workspace::Package;

/// Files and folders outside of all packages, each with the package whose tests read it.
const OUTSIDE: [(&str, &str); 4] = [
    ("docs", "kvmmem-cli"),
    ("README.md", "kvmmem-cli"),
    ("packaging", "xtask"),
    ("kernel", "xtask"),
];

/// Files that decide how every package is built or linted.
const WORKSPACE: [&str; 5] =
    ["Cargo.toml", "Cargo.lock", "clippy.toml", "rustfmt.toml", ".cargo/config.toml"];

/// What changed, as packages.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes<'a> {
    /// Packages with a changed file.
    pub(crate) changed: BTreeSet<&'a str>,
    /// Packages that depend on those, directly or through others, and did not change.
    pub(crate) dependants: BTreeSet<&'a str>,
    /// Whether a file of [`WORKSPACE`] changed.
    pub(crate) workspace: bool,
    /// Changed files that no package's checks cover.
    pub(crate) rest: Vec<&'a Path>,
}

impl<'a> Changes<'a> {
    /// Maps `files`, which are relative to `root`.
    pub(crate) fn new(root: &Path, files: &'a [PathBuf], packages: &'a [Package]) -> Self {
        let mut changes = Self::default();
        for file in files {
            match owner(root, file, packages) {
                Some(name) => {
                    changes.changed.insert(name);
                }
                None if WORKSPACE.iter().any(|name| file == Path::new(name)) => {
                    changes.workspace = true;
                }
                None => changes.rest.push(file),
            }
        }
        changes.dependants = dependants(&changes.changed, packages);
        changes
    }
}

fn owner<'a>(root: &Path, file: &Path, packages: &'a [Package]) -> Option<&'a str> {
    let path = root.join(file);
    let around = packages.iter().filter(|package| path.starts_with(package.folder()));
    let innermost = around.max_by_key(|package| package.folder().components().count());
    let outside = || {
        let (_, name) = OUTSIDE.iter().find(|(folder, _)| file.starts_with(folder))?;
        packages.iter().find(|package| package.name == *name)
    };
    innermost.or_else(outside).map(|package| package.name.as_str())
}

/// The packages outside of `changed` that depend on one in it, directly or through others.
fn dependants<'a>(changed: &BTreeSet<&'a str>, packages: &'a [Package]) -> BTreeSet<&'a str> {
    let mut reached = changed.clone();
    loop {
        let further = packages.iter().filter(|package| {
            !reached.contains(package.name.as_str())
                && reached.iter().any(|name| package.depends_on(name))
        });
        let further: Vec<_> = further.map(|package| package.name.as_str()).collect();
        if further.is_empty() {
            return &reached - changed;
        }
        reached.extend(further);
    }
}

/// The files that differ from where this branch left `since`, with untracked ones. Without `since`:
/// from where it left its upstream, else `origin/main`, else the last commit.
pub(crate) fn files(since: Option<&str>, log: &Path) -> Result<Vec<PathBuf>> {
    let git = |args: &[&str]| Tool::new("git", log).args(args).dir(project::root()).output();
    let base = match since {
        Some(revision) => git(&["merge-base", "HEAD", revision])?,
        None => git(&["merge-base", "HEAD", "@{upstream}"])
            .or_else(|_| git(&["merge-base", "HEAD", "origin/main"]))
            .or_else(|_| git(&["rev-parse", "HEAD"]))
            .context("cannot tell what changed without git; run `cargo xtask test`")?,
    };
    let changed = git(&["diff", "--name-only", "-z", "--relative", base.trim()])?;
    let new = git(&["ls-files", "--others", "--exclude-standard", "-z"])?;
    let names = changed.split('\0').chain(new.split('\0')).filter(|name| !name.is_empty());
    Ok(names.map(PathBuf::from).collect::<BTreeSet<_>>().into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Dependency;

    /// `abi` <- `sys` <- `cli`, whose tests use `probe`; `table` alone.
    fn packages() -> Vec<Package> {
        let package = |name: &str, folder: &str, used: &[(&str, Option<&str>)]| Package {
            name: name.into(),
            manifest_path: Path::new("/w").join(folder).join("Cargo.toml"),
            dependencies: used
                .iter()
                .map(|(name, kind)| Dependency {
                    name: (*name).into(),
                    kind: kind.map(Into::into),
                    path: Some(PathBuf::new()),
                })
                .collect(),
            targets: Vec::new(),
        };
        vec![
            package("abi", "crates/abi", &[]),
            package("sys", "crates/sys", &[("abi", None)]),
            package("kvmmem-cli", "crates/cli", &[("sys", None), ("probe", Some("dev"))]),
            package("probe", "tests/probe", &[]),
            package("inner", "crates/abi/inner", &[]),
            package("table", "crates/table", &[]),
        ]
    }

    fn map<'a>(files: &'a [PathBuf], packages: &'a [Package]) -> Changes<'a> {
        Changes::new(Path::new("/w"), files, packages)
    }

    #[test]
    fn a_file_selects_its_package_and_all_that_depend_on_it() {
        let (packages, files) = (packages(), [PathBuf::from("crates/abi/src/lib.rs")]);
        let changes = map(&files, &packages);
        assert_eq!(changes.changed, ["abi"].into());
        assert_eq!(changes.dependants, ["kvmmem-cli", "sys"].into());
        assert!(!changes.workspace && changes.rest.is_empty());
    }

    #[test]
    fn a_dependency_of_tests_counts_and_a_changed_dependant_is_listed_once() {
        let packages = packages();
        let files = ["tests/probe/Cargo.toml", "crates/sys/a.rs"].map(PathBuf::from);
        let changes = map(&files, &packages);
        assert_eq!(changes.changed, ["probe", "sys"].into());
        assert_eq!(changes.dependants, ["kvmmem-cli"].into());
    }

    #[test]
    fn the_innermost_package_owns_a_file() {
        let (packages, files) = (packages(), [PathBuf::from("crates/abi/inner/src/lib.rs")]);
        assert_eq!(map(&files, &packages).changed, ["inner"].into());
        // A name that only begins alike is another folder.
        let files = [PathBuf::from("crates/abi2/src/lib.rs")];
        assert_eq!(map(&files, &packages).rest, [Path::new("crates/abi2/src/lib.rs")]);
    }

    #[test]
    fn files_outside_of_packages_select_the_tests_that_read_them() {
        let packages = packages();
        let files = ["docs/guide/operator.md", "Cargo.lock", "SECURITY.md"].map(PathBuf::from);
        let changes = map(&files, &packages);
        assert_eq!(changes.changed, ["kvmmem-cli"].into());
        assert!(changes.workspace);
        assert_eq!(changes.rest, [Path::new("SECURITY.md")]);
    }

    #[test]
    fn the_table_names_packages_and_files_of_this_workspace() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let workspace = crate::workspace::Workspace::read(log.path()).unwrap();
        for (path, name) in OUTSIDE {
            assert!(project::root().join(path).exists(), "{path}");
            assert!(workspace.packages.iter().any(|package| package.name == name), "{name}");
        }
        for path in WORKSPACE {
            assert!(project::root().join(path).exists(), "{path}");
        }
    }
}

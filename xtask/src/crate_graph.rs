// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Crate graph: checks that crates depend only on those allowed here. No tool and no VMM links the
//! broker.

use std::path::Path;

use anyhow::Result;

use crate::project;
use crate::workspace::{Package, Workspace};

/// Each library or program that is shipped, and the crates of the workspace that it may depend on.
/// Tests and benches may use any.
const ALLOWED: [(&str, &[&str]); 14] = [
    ("kvmmem-abi", &[]),
    ("kvmmem-table", &[]),
    ("kvmmem-limit", &[]),
    ("kvmmem-kvmi", &["kvmmem-abi"]),
    ("kvmmem-sys", &["kvmmem-abi"]),
    ("kvmmem-memory", &["kvmmem-sys"]),
    ("kvmmem-linux", &["kvmmem-memory"]),
    ("kvmmem-proto", &["kvmmem-kvmi"]),
    ("kvmmem-client", &["kvmmem-kvmi", "kvmmem-limit", "kvmmem-proto"]),
    ("kvmmem", &["kvmmem-abi", "kvmmem-kvmi", "kvmmem-memory", "kvmmem-proto", "kvmmem-sys"]),
    ("kvmmem-vmm", &["kvmmem-abi", "kvmmem-client", "kvmmem-limit", "kvmmem-proto", "kvmmem-sys"]),
    ("kvmmem-qemu", &["kvmmem-abi", "kvmmem-limit", "kvmmem-proto", "kvmmem-sys"]),
    (
        "kvmmem-broker",
        &["kvmmem-abi", "kvmmem-kvmi", "kvmmem-limit", "kvmmem-proto", "kvmmem-qemu", "kvmmem-sys"],
    ),
    (
        "kvmmem-cli",
        &[
            "kvmmem",
            "kvmmem-abi",
            "kvmmem-broker",
            "kvmmem-client",
            "kvmmem-linux",
            "kvmmem-memory",
            "kvmmem-proto",
            "kvmmem-qemu",
            "kvmmem-sys",
            "kvmmem-vmm",
        ],
    ),
];

/// The dependencies that [`ALLOWED`] lacks, each with its crate. `log` gets cargo's messages.
pub(crate) fn forbidden(log: &Path) -> Result<Vec<String>> {
    let workspace = Workspace::read(log)?;
    let crates = project::root().join("crates");
    let shipped = |package: &&Package| package.manifest_path.starts_with(&crates);
    Ok(workspace.packages.iter().filter(shipped).flat_map(check).collect())
}

fn check(package: &Package) -> Vec<String> {
    let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == package.name) else {
        return vec![format!("{}: not in the table of xtask/src/crate_graph.rs", package.name)];
    };
    let used = package
        .dependencies
        .iter()
        .filter(|one| one.kind.as_deref() != Some("dev") && one.path.is_some());
    used.filter(|one| !allowed.contains(&one.name.as_str()))
        .map(|one| format!("{} depends on {}", package.name, one.name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Dependency;

    fn package(name: &str, dependency: &str, kind: Option<&str>, path: Option<&str>) -> Package {
        let (kind, path) = (kind.map(str::to_owned), path.map(Into::into));
        let dependencies = vec![Dependency { name: dependency.into(), kind, path }];
        Package {
            name: name.into(),
            manifest_path: Default::default(),
            dependencies,
            targets: Vec::new(),
        }
    }

    #[test]
    fn a_tool_that_links_the_broker_is_refused() {
        let found = check(&package("kvmmem", "kvmmem-broker", None, Some("/")));
        assert_eq!(found, ["kvmmem depends on kvmmem-broker"]);
        assert_eq!(check(&package("kvmmem", "kvmmem-broker", Some("build"), Some("/"))).len(), 1);
        assert_eq!(check(&package("kvmmem", "kvmmem-broker", Some("dev"), Some("/"))), [""; 0]);
        assert_eq!(check(&package("kvmmem", "serde", None, None)), [""; 0]);
        assert_eq!(check(&package("kvmmem-new", "serde", None, None)).len(), 1);
    }

    #[test]
    fn the_architecture_has_the_same_table() {
        let page = project::root().join("docs/design/architecture.md");
        let text = std::fs::read_to_string(page).unwrap();
        for (name, allowed) in ALLOWED {
            let row = text.lines().find(|line| line.starts_with(&format!("| `{name}` |"))).unwrap();
            let short: Vec<_> =
                allowed.iter().map(|name| name.trim_start_matches("kvmmem-")).collect();
            let cell = row.trim_end_matches('|').rsplit('|').next().unwrap();
            assert_eq!(cell.trim(), short.join(", "), "{row}");
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The workspace as `cargo metadata` describes it: packages, their targets and their dependencies.
//!
//! `cargo xtask check` maps changed files to packages with it, the style suite checks the crate
//! graph, and builds ask it for cargo's target folder.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::project;
use crate::tool::Tool;

/// The part of `cargo metadata`'s answer that is used.
#[derive(Debug, Deserialize)]
pub(crate) struct Workspace {
    pub(crate) packages: Vec<Package>,
    pub(crate) target_directory: PathBuf,
}

/// A package of the workspace.
#[derive(Debug, Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) manifest_path: PathBuf,
    pub(crate) dependencies: Vec<Dependency>,
    pub(crate) targets: Vec<Target>,
}

/// What a package depends on.
#[derive(Debug, Deserialize)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    /// `dev` or `build`; absent for what is linked.
    pub(crate) kind: Option<String>,
    /// Set for packages of the workspace.
    pub(crate) path: Option<PathBuf>,
}

/// What cargo builds of a package.
#[derive(Debug, Deserialize)]
pub(crate) struct Target {
    /// `lib`, `bin`, `test`, `example` or `bench`.
    pub(crate) kind: Vec<String>,
}

impl Workspace {
    /// Asks cargo. `log` gets its messages.
    pub(crate) fn read(log: &Path) -> Result<Self> {
        let text = Tool::new(project::cargo(), log)
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .dir(project::root())
            .output()?;
        serde_json::from_str(&text).context("cargo metadata")
    }
}

impl Package {
    /// The folder with its manifest.
    pub(crate) fn folder(&self) -> &Path {
        self.manifest_path.parent().unwrap_or(&self.manifest_path)
    }

    /// Whether it has a library.
    pub(crate) fn has_library(&self) -> bool {
        self.targets.iter().any(|target| target.kind.iter().any(|kind| kind == "lib"))
    }

    /// Whether it depends on the workspace's package `name`, in its tests or otherwise.
    pub(crate) fn depends_on(&self, name: &str) -> bool {
        self.dependencies.iter().any(|one| one.path.is_some() && one.name == name)
    }
}

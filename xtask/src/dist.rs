// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask dist`: Debian packages of this checkout.

pub(crate) mod check;
mod contents;
mod package;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::binaries::{Binaries, ProgramSet};
use crate::cache::Cache;
use crate::provision::{self, Purpose};
use crate::tool::Tool;
use crate::{project, ui};

/// Environment variable with the packages' time, for a checkout that is not a git repository.
const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// What all packages of one run have in common.
#[derive(Debug)]
pub(crate) struct Release {
    /// Of the workspace.
    pub(crate) version: String,
    /// Distinguishes packages of one version, from 1.
    pub(crate) revision: u32,
    pub(crate) repository: String,
    /// Of the last commit: seconds since 1970. No file in a package is younger.
    epoch: String,
    /// The same in a changelog's form.
    date: String,
}

/// Makes all packages in `folder`, or in `dist` of cargo's target folder; returns them.
pub(crate) fn run(folder: Option<PathBuf>, revision: u32) -> Result<Vec<PathBuf>> {
    let cache = Cache::open()?;
    provision(&cache)?;
    let release = Release::of_checkout(&cache, revision)?;
    let binaries = Binaries::make(&cache, ProgramSet::Installed)?;
    let folder = match folder {
        Some(folder) => folder,
        None => project::target(&cache.log("dist"))?.join("dist"),
    };
    make(&cache, &release, &binaries, &folder)
}

/// What packages are made with.
fn provision(cache: &Cache) -> Result<()> {
    let _lock = cache.lock()?;
    provision::provision(cache, Purpose::Packages)
}

/// Makes all packages of `release` in `folder`.
fn make(
    cache: &Cache,
    release: &Release,
    binaries: &Binaries,
    folder: &Path,
) -> Result<Vec<PathBuf>> {
    let log = cache.fresh_log("dist")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let folder = folder.canonicalize()?;
    ui::step(&format!("packages of {}", release.full()), || {
        let packages = contents::PACKAGES.iter();
        packages.map(|package| package.build(cache, release, binaries, &folder, &log)).collect()
    })
}

impl Release {
    fn of_checkout(cache: &Cache, revision: u32) -> Result<Self> {
        let log = cache.fresh_log("dist")?;
        let metadata = Tool::new(project::cargo(), &log)
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .dir(project::root())
            .output()?;
        let metadata: serde_json::Value =
            serde_json::from_str(&metadata).context("cargo metadata")?;
        let packages = metadata.get("packages").and_then(|packages| packages.as_array());
        let tool = packages.into_iter().flatten().find(|one| one["name"] == "kvmmem-cli");
        let field = |name: &str| {
            let value = tool.and_then(|tool| tool[name].as_str());
            value
                .map(str::to_owned)
                .with_context(|| format!("cargo metadata has no {name} of kvmmem-cli"))
        };
        let version = field("version")?;
        check_module_version(&version)?;
        let epoch = epoch(&log)?;
        let date = Tool::new("date", &log)
            .args(["--utc", "--rfc-email", "--date"])
            .arg(format!("@{epoch}"))
            .env("LC_ALL", "C")
            .output()?;
        let date = date.trim().to_owned();
        Ok(Self { version, revision, repository: field("repository")?, epoch, date })
    }

    /// The packages' version.
    fn full(&self) -> String {
        format!("{}-{}", self.version, self.revision)
    }
}

/// Time of the last commit, unless the environment has another one.
fn epoch(log: &Path) -> Result<String> {
    let given = std::env::var(EPOCH).ok().filter(|epoch| !epoch.is_empty());
    let epoch = match given {
        Some(epoch) => epoch,
        None => Tool::new("git", log)
            .args(["log", "-1", "--format=%ct"])
            .dir(project::root())
            .output()
            .with_context(|| format!("git does not say when this was committed: set {EPOCH}"))?,
    };
    match epoch.trim().parse::<u32>() {
        Ok(seconds) => Ok(seconds.to_string()),
        Err(_) => bail!("{EPOCH} is {epoch:?}, not a number of seconds"),
    }
}

/// DKMS knows the module by the version in its own file.
fn check_module_version(version: &str) -> Result<()> {
    let path = project::root().join("kernel/dkms.conf");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let expected = format!("PACKAGE_VERSION=\"{version}\"");
    if !text.lines().any(|line| line == expected) {
        bail!("kernel/dkms.conf does not say {expected}, the workspace's version");
    }
    Ok(())
}

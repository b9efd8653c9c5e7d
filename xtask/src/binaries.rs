// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The project's own programs, static, for VMs that have no libraries.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::cache::Cache;
use crate::tool::Tool;
use crate::{project, ui};

/// The only target that the test bed knows.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// See the profile of this name in Cargo.toml.
const PROFILE: &str = "testbed";

/// Package and program of each.
const PROGRAMS: [(&str, &str); 5] = [
    ("kvmmem-cli", "kvmmem"),
    ("kvmmem-broker", "kvmmemd"),
    ("kvmmem-guest", "kvmmem-guest"),
    ("kvmmem-probe", "kvmmem-probe"),
    ("kvmmem-e2e", "kvmmem-e2e"),
];

/// The scenarios' tool in C, written only from the C header: source and program.
const C_PROGRAM: (&str, &str) = ("tests/e2e/guest/raw.c", "kvmmem-raw");

/// Where that header is.
const C_HEADERS: &str = "crates/kvmmem-abi/include/uapi";

/// The folder they have been built into.
#[derive(Debug)]
pub(crate) struct Binaries {
    folder: PathBuf,
}

impl Binaries {
    /// Builds them all.
    pub(crate) fn make(cache: &Cache) -> Result<Self> {
        let log = cache.fresh_log("binaries")?;
        let folder = project::target(&log)?.join(TARGET).join(PROFILE);
        ui::step("binaries: static programs for the VMs", || {
            Tool::new(project::cargo(), &log)
                .args(["build", "--profile", PROFILE, "--target", TARGET, "--bins"])
                .args(PROGRAMS.iter().flat_map(|(package, _)| ["--package", package]))
                .env("RUSTFLAGS", "-C target-feature=+crt-static")
                .dir(project::root())
                .run()?;
            let (source, program) = C_PROGRAM;
            Tool::new("cc", &log)
                .args(["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-I", C_HEADERS, "-o"])
                .arg(folder.join(program))
                .arg(source)
                .dir(project::root())
                .run()
        })?;
        let binaries = Self { folder };
        for name in Self::names() {
            if !binaries.path(name).is_file() {
                bail!("cargo built no {}", binaries.path(name).display());
            }
        }
        Ok(binaries)
    }

    pub(crate) fn names() -> impl Iterator<Item = &'static str> {
        PROGRAMS.iter().map(|(_, name)| *name).chain([C_PROGRAM.1])
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Builds the project's own programs statically, for VMs without libraries.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::cache::Cache;
use crate::tool::Tool;
use crate::{project, ui};

/// The only target that the test bed knows.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// See the profile of this name in Cargo.toml.
const PROFILE: &str = "testbed";

/// Package and program of each. The first one makes packages of the next two; those two and the
/// rest are for VMs. Each VM needs the fourth to boot.
const PROGRAMS: [(&str, &str); 6] = [
    ("kvmmem-manual", "kvmmem-manual"),
    ("kvmmem-cli", "kvmmem"),
    ("kvmmem-broker", "kvmmemd"),
    ("kvmmem-guest", "kvmmem-guest"),
    ("kvmmem-probe", "kvmmem-probe"),
    ("kvmmem-e2e", "kvmmem-e2e"),
];

/// The scenarios' tools in C, written only from the C header: sources and program.
const C_PROGRAMS: [(&[&str], &str); 3] = [
    (&["tests/e2e/guest/raw.c"], "kvmmem-raw"),
    (&["tests/e2e/guest/view.c", "tests/e2e/guest/devices.c"], "kvmmem-view"),
    (&["tests/e2e/guest/bench.c"], "kvmmem-bench"),
];

/// Where that header is.
const C_HEADERS: &str = "crates/kvmmem-abi/include/uapi";

/// Which programs are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProgramSet {
    /// What a VM needs to boot.
    Init,
    /// What is packaged, and what makes its manual pages.
    Installed,
    /// All that VMs run.
    All,
}

/// Programs that have been built.
#[derive(Debug)]
pub(crate) struct Binaries {
    folder: PathBuf,
    names: Vec<&'static str>,
}

impl Binaries {
    /// Builds the wanted programs.
    pub(crate) fn make(cache: &Cache, wanted: ProgramSet) -> Result<Self> {
        let log = cache.fresh_log("binaries")?;
        let folder = project::target(&log)?.join(TARGET).join(PROFILE);
        let programs = match wanted {
            ProgramSet::Init => PROGRAMS.get(3..4),
            ProgramSet::Installed => PROGRAMS.get(..3),
            ProgramSet::All => PROGRAMS.get(1..),
        };
        let programs = programs.unwrap_or_default();
        let mut names: Vec<_> = programs.iter().map(|(_, name)| *name).collect();
        ui::step("binaries: static programs", || {
            Tool::new(project::cargo(), &log)
                .args(["build", "--profile", PROFILE, "--target", TARGET, "--bins"])
                .args(programs.iter().flat_map(|(package, _)| ["--package", package]))
                .env("CARGO_ENCODED_RUSTFLAGS", flags())
                .dir(project::root())
                .run()?;
            if wanted == ProgramSet::All {
                for (sources, program) in C_PROGRAMS {
                    names.push(program);
                    Tool::new("cc", &log)
                        .args([
                            "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-I", C_HEADERS, "-o",
                        ])
                        .arg(folder.join(program))
                        .args(sources)
                        .dir(project::root())
                        .run()?;
                }
            }
            Ok(())
        })?;
        let binaries = Self { folder, names };
        for name in binaries.names() {
            if !binaries.path(name).is_file() {
                bail!("cargo built no {}", binaries.path(name).display());
            }
        }
        Ok(binaries)
    }

    pub(crate) fn names(&self) -> &[&'static str] {
        &self.names
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

/// The compiler's flags, as cargo wants several: without libraries, and without the paths of this
/// machine, which would otherwise be in the messages of panics.
fn flags() -> OsString {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home =
        home.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let mut flags = OsString::from("-Ctarget-feature=+crt-static");
    if let Some(home) = home {
        flags.push("\x1f--remap-path-prefix=");
        flags.push(home);
        flags.push("=/cargo");
    }
    flags
}

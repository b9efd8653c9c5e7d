// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Debug kernel: the source of the test bed's kernel, built in the build root with what finds
//! faults (KASAN, lockdep, kmemleak) and with fault injection. Suite `debug-kernel` boots it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::cache::{Cache, Key};
use crate::kernel::{BuildTree, Kernel};
use crate::root::{self, Root};
use crate::tool::Tool;
use crate::{project, ui};

/// The options, over tinyconfig.
const CONFIGURATION: &str = "kernel/selftest/debug.config";

/// Where debug kernels are, inside the root.
const FOLDER: &str = "/kvmmem/debug-kernel";

/// KASAN with Rust needs clang.
const COMPILER: &str = "CC=clang";

/// A debug kernel that has been built.
pub(crate) struct DebugKernel<'a> {
    root: &'a Root,
    /// Inside the root.
    source: String,
    version: String,
}

impl<'a> DebugKernel<'a> {
    /// The debug kernel of the same source as `kernel`, built if it is not there. The cache must
    /// be locked. A build that was interrupted is continued.
    pub(crate) fn make(cache: &Cache, kernel: &'a Kernel) -> Result<Self> {
        let path = project::root().join(CONFIGURATION);
        let wanted = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let mut key = Key::default();
        key.add(kernel.version());
        key.add(&wanted);
        let key = key.finish();
        let folder = format!("{FOLDER}/{key}");
        let made = Self {
            root: kernel.root(),
            source: format!("{folder}/source"),
            version: format!("{}-{key}", kernel.version()),
        };
        // Written last.
        let complete = format!("{folder}/complete");
        if !made.root.path(&complete).exists() {
            let log = cache.fresh_log("debug-kernel")?;
            let sh = |script: &str| made.root.tool("sh", &log).args(["-e", "-c", script]);
            let make = || made.root.tool("make", &log).args(["-C", &made.source, COMPILER]);
            if !made.root.path(&folder).exists() {
                // Those of other versions and configurations: each takes 2.5 GB.
                root::remove(&made.root.path(FOLDER), &log)?;
            }
            if !made.root.path(&made.source).exists() {
                ui::step("debug kernel: its source", || {
                    sh(&unpack(kernel.source(), &folder, &made.source)).run()
                })?;
            }
            ui::step("debug kernel: its configuration", || {
                let copy = made.root.path(&format!("{folder}/debug.config"));
                Tool::as_root("cp", &log).arg(&path).arg(copy).run()?;
                make().args(["-s", "tinyconfig"]).run()?;
                sh(&format!("cat {folder}/debug.config >> {}/.config", made.source)).run()?;
                make().args(["-s", "olddefconfig"]).run()?;
                let path = made.root.path(&format!("{}/.config", made.source));
                let config =
                    fs::read_to_string(&path).with_context(|| path.display().to_string())?;
                let refused = refused(&wanted, &config);
                if !refused.is_empty() {
                    bail!("the kernel refuses {}", refused.join(", "));
                }
                Ok(())
            })?;
            let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            ui::step("debug kernel: its build, 15 minutes on two CPUs", || {
                make().arg(format!("-j{jobs}")).args(["-s", "bzImage", "modules"]).run()?;
                sh(&format!("touch {complete}")).run()
            })?;
        }
        Ok(made)
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.root.path(&format!("{}/arch/x86/boot/bzImage", self.source))
    }

    pub(crate) fn build_tree(&self) -> BuildTree<'_> {
        BuildTree {
            root: self.root,
            path: &self.source,
            version: &self.version,
            variables: &[COMPILER],
        }
    }
}

/// The script that unpacks the archive of a prepared source, so that `source` is there whole or
/// not at all.
fn unpack(prepared: &str, folder: &str, source: &str) -> String {
    let name = prepared.rsplit('/').next().unwrap_or(prepared);
    format!(
        "rm -rf {folder}/partial; mkdir -p {folder}/partial; \
         tar xf /usr/src/{name}.tar.xz -C {folder}/partial; mv {folder}/partial/{name} {source}"
    )
}

/// The lines of the wanted configuration that a kernel's configuration does not follow, because the
/// kernel does not know the option or something that it needs is off.
fn refused<'a>(wanted: &'a str, config: &str) -> Vec<&'a str> {
    let has = |line: &str| config.lines().any(|other| other == line);
    let is_followed = |line: &str| match line.strip_suffix(" is not set") {
        // One that cannot be set is not mentioned.
        Some(off) => {
            let set = format!("{}=", off.trim_start_matches("# "));
            !config.lines().any(|other| other.starts_with(&set))
        }
        None => line.is_empty() || line.starts_with('#') || has(line),
    };
    wanted.lines().filter(|line| !is_followed(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_did_not_take_are_named() {
        let wanted = "# Why\n\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n# CONFIG_D is not set\n# CONFIG_E is not set";
        let config = "CONFIG_A=y\nCONFIG_B=m\nCONFIG_C=y\nCONFIG_CC=y\n# CONFIG_D is not set\n";
        assert_eq!(refused(wanted, config), ["CONFIG_B=y", "# CONFIG_C is not set"]);
    }

    #[test]
    fn the_configuration_finds_what_the_suite_fails_on() {
        let config = fs::read_to_string(project::root().join(CONFIGURATION)).unwrap();
        for option in ["KASAN", "PROVE_LOCKING", "DEBUG_KMEMLEAK", "DETECT_HUNG_TASK", "FAILSLAB"] {
            let line = format!("CONFIG_{option}=y");
            assert!(config.lines().any(|other| other == line), "{line}");
        }
    }
}

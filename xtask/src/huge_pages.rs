// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reserves huge pages while the unit suite runs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::interrupt::{self, Watch};
use crate::tool::{Tool, is_installed, is_root};

/// How many pages of 2 MiB this machine sets aside (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// What the tests of one program take at once: a VM of 64 MiB, and some pages of other tests.
const NEEDED: u64 = 96;

/// A larger pool, until this is dropped.
pub(crate) struct HugePages {
    before: u64,
    log: PathBuf,
    /// Ctrl-C ends the tests, and then this process, once it has returned the pages.
    _watch: Watch,
}

impl HugePages {
    /// Sets pages aside where too few are.
    ///
    /// # Errors
    /// Where this machine has no such pool, or only root could change it.
    pub(crate) fn reserve(log: &Path) -> Result<Self> {
        let before = size()?;
        let pages = Self { before, log: log.to_owned(), _watch: interrupt::watch()? };
        if before < NEEDED {
            ensure!(is_root() || is_installed("sudo"), "only root sets huge pages aside");
            pages.set(NEEDED)?;
        }
        Ok(pages)
    }

    fn set(&self, count: u64) -> Result<()> {
        Tool::as_root("sysctl", &self.log)
            .arg("--quiet")
            .arg(format!("vm.nr_hugepages={count}"))
            .run()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.before < NEEDED {
            // The suite's result does not depend on it.
            let _ = self.set(self.before);
        }
    }
}

fn size() -> Result<u64> {
    let text = fs::read_to_string(POOL).with_context(|| format!("cannot read {POOL}"))?;
    text.trim().parse().with_context(|| format!("{POOL} is no number: {text:?}"))
}

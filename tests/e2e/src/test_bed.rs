// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Paths of the test bed's files.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// The directory that `KVMMEM_TEST_BED` names.
pub(crate) struct TestBed {
    root: PathBuf,
}

impl TestBed {
    /// Takes the test bed from the environment and checks that nothing is missing.
    pub(crate) fn from_env() -> Result<Self> {
        let root = std::env::var_os("KVMMEM_TEST_BED").map(PathBuf::from).context(
            "KVMMEM_TEST_BED is not set: `cargo xtask e2e` runs this program where it is",
        )?;
        let bed = Self { root };
        for file in
            [bed.kernel(), bed.target_initrd(), bed.introspector_initrd(), bed.bin("kvmmem")]
        {
            if !file.exists() {
                bail!("the test bed lacks {}: run `cargo xtask testbed`", file.display());
            }
        }
        Ok(bed)
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.root.join("vmlinuz")
    }

    pub(crate) fn target_initrd(&self) -> PathBuf {
        self.root.join("guest.cpio")
    }

    pub(crate) fn introspector_initrd(&self) -> PathBuf {
        self.root.join("introspector.cpio")
    }

    /// The kernel of a Debian release, and what an introspector without the module boots with it.
    pub(crate) fn stock_kernel(&self, release: &str) -> Result<(PathBuf, PathBuf)> {
        let folder = self.root.join("kernels").join(release);
        if !folder.exists() {
            bail!("the test bed lacks the kernel of Debian {release}");
        }
        Ok((folder.join("vmlinuz"), folder.join("introspector.cpio")))
    }

    pub(crate) fn bin(&self, name: &str) -> PathBuf {
        self.root.join("bin").join(name)
    }

    /// The systems with a stock QEMU each, where the test bed's host has them.
    pub(crate) fn qemus(&self) -> Result<PathBuf> {
        std::env::var_os("KVMMEM_TEST_BED_QEMUS").map(PathBuf::from).context(
            "no stock QEMUs here: only an emulated host has them, see KVMMEM_TEST_BED_HOST in docs/testbed.md",
        )
    }

    /// What `cargo xtask try` brought along.
    pub(crate) fn brought(&self) -> PathBuf {
        self.root.join("try")
    }
}

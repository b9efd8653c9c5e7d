// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The build root: a Debian system in a folder, with the compiler that Debian's own kernel was
//! built with.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::cache::{Cache, Key};
use crate::tool::Tool;
use crate::{mirror, ui};

/// The release whose compiler fits its backported kernels.
const SUITE: &str = "trixie";

/// Where the newest kernels are.
pub(crate) const BACKPORTS: &str = "trixie-backports";

/// What a kernel module in Rust is built with.
const PACKAGES: [&str; 18] = [
    "ca-certificates",
    "rustc",
    "rust-src",
    "bindgen",
    "clang",
    "libclang-dev",
    "gcc",
    "make",
    "flex",
    "bison",
    "bc",
    "xz-utils",
    "zstd",
    "kmod",
    "cpio",
    "python3-minimal",
    "perl",
    "libssl-dev",
];

/// A complete build root.
#[derive(Debug)]
pub(crate) struct Root {
    folder: PathBuf,
}

impl Root {
    /// Where the root of these packages is, whether it has been made or not.
    pub(crate) fn folder(cache: &Cache) -> PathBuf {
        let mut key = Key::default();
        [SUITE, BACKPORTS].iter().chain(&PACKAGES).for_each(|word| key.add(word));
        cache.folder().join(format!("root-{}", key.finish()))
    }

    /// A root that has been made.
    pub(crate) fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The root, made if it is not there. The cache must be locked.
    pub(crate) fn make(cache: &Cache) -> Result<Self> {
        let root = Self { folder: Self::folder(cache) };
        if !root.folder.exists() {
            let log = cache.fresh_log("root")?;
            ui::step("build root: a Debian system in a folder", || root.install(cache, &log))?;
        }
        Ok(root)
    }

    /// A path inside, seen from outside.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.folder.join(inside.trim_start_matches('/'))
    }

    /// A program inside, as root, with /proc: objtool reads its limits there.
    pub(crate) fn tool(&self, program: &str, log: &Path) -> Tool {
        // In a mount namespace of its own, so that nothing stays mounted however the program ends.
        const ENTER: &str =
            "mount --rbind /proc \"$0/proc\" && exec chroot \"$0\" /usr/bin/env -i \"$@\"";
        Tool::as_root("unshare", log).args(["--mount", "sh", "-c", ENTER]).arg(&self.folder).args([
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL=C.UTF-8",
            "HOME=/root",
            "DEBIAN_FRONTEND=noninteractive",
            program,
        ])
    }

    fn install(&self, cache: &Cache, log: &Path) -> Result<()> {
        let mirror = mirror::find()?;
        // An interrupted run's rest, if any: it never gets the final name.
        let partial = cache.folder().join("partial-root");
        remove(&partial, log)?;
        Tool::as_root("mmdebstrap", log)
            .args(["--variant=apt", "--format=directory"])
            .arg(format!("--include={}", PACKAGES.join(",")))
            .arg("--aptopt=APT::Install-Recommends \"false\"")
            .arg(SUITE)
            .arg(&partial)
            .args([SUITE, BACKPORTS].map(|suite| format!("deb {mirror} {suite} main")))
            .run()?;
        let null = partial.join("dev/null");
        if !fs::metadata(&null).is_ok_and(|null| null.file_type().is_char_device()) {
            bail!(
                "the build root has no /dev/null: device nodes cannot be made here (a container without CAP_MKNOD?)"
            );
        }
        fs::rename(&partial, &self.folder)
            .with_context(|| format!("cannot make {}", self.folder.display()))
    }
}

/// Removes a folder that belongs to root, if it is there.
pub(crate) fn remove(folder: &Path, log: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    Tool::as_root("rm", log).args(["-rf", "--one-file-system", "--"]).arg(folder).run()
}

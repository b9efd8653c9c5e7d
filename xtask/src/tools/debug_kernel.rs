// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel with its debug information, from Debian's package: stacks need it. 350 MB are
//! downloaded and 410 MB kept, so only where the user wants it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::cache::Cache;
use crate::test_bed::TestBed;
use crate::tool::Tool;
use crate::ui;

/// Set, it has the kernel downloaded.
const VARIABLE: &str = "KVMMEM_DEBUG_KERNEL";

/// The program with debug information, of the test bed's kernel: from the cache, or downloaded if
/// that is wanted.
pub(super) fn find(cache: &Cache, bed: &TestBed, log: &Path) -> Result<PathBuf> {
    let (kernel, root) = (bed.kernel(), bed.kernel().root());
    let (release, version) = (kernel.release(), kernel.version());
    let inside = format!("/kvmmem/debug-{release}");
    let found = root.path(&inside);
    if found.exists() {
        return Ok(found);
    }
    if std::env::var_os(VARIABLE).is_none_or(|value| value.is_empty()) {
        bail!(
            "the kernel's debug information is not in the cache (350 MB to download): {VARIABLE}=1 cargo xtask test --only tools"
        );
    }
    let _lock = cache.lock()?;
    let script = format!(
        "set -e; mkdir -p /kvmmem/packages; cd /kvmmem/packages; rm -f *; \
         apt-get download -q 'linux-image-{release}-dbg={version}'; \
         dpkg-deb --fsys-tarfile *.deb | tar -xO './usr/lib/debug/lib/modules/{release}/vmlinux' > vmlinux; \
         mv vmlinux {inside}; rm -r /kvmmem/packages"
    );
    ui::step("tools: the kernel with its debug information", || {
        root.tool("sh", log).args(["-c", &script]).run()
    })?;
    ensure!(found.exists(), "Debian's package has no vmlinux");
    Ok(found)
}

/// Puts it where a program in another root sees it, without a copy where that is possible.
pub(super) fn link(vmlinux: &Path, to: &Path, log: &Path) -> Result<()> {
    let link = Tool::as_root("ln", log).arg(vmlinux).arg(to).run();
    link.or_else(|_| Tool::as_root("cp", log).arg("--").arg(vmlinux).arg(to).run())
        .with_context(|| format!("cannot make {}", to.display()))
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Room on the disks that a run writes to, so that a full one is named before anything is built.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use rustix::fs::statvfs;

/// What a run writes where everything was built before. A first run takes several times as much.
const NEEDED: u64 = 2 << 30;

/// Checks that `folder`, which exists, has room for a run.
///
/// # Errors
/// Where its file system has too little.
pub(crate) fn has_room(folder: &Path) -> Result<()> {
    let disk = statvfs(folder).with_context(|| folder.display().to_string())?;
    is_enough(folder, disk.f_bavail.saturating_mul(disk.f_frsize))
}

fn is_enough(folder: &Path, free: u64) -> Result<()> {
    if free < NEEDED {
        bail!(
            "{}: its file system has {} MiB free, and a run needs {} MiB: remove what is not needed there \
             (`cargo clean` empties cargo's target folder, `cargo xtask clean` the cache)",
            folder.display(),
            free >> 20,
            NEEDED >> 20
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_named() {
        let folder = Path::new("/somewhere");
        assert!(is_enough(folder, NEEDED).is_ok());
        let error = is_enough(folder, NEEDED - 1).unwrap_err().to_string();
        assert!(error.starts_with("/somewhere: its file system has 2047 MiB free"), "{error}");
    }
}

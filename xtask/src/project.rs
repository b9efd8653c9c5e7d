// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The checkout that xtask was built from.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::workspace::Workspace;

/// Root of the checkout.
pub(crate) fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Cargo, as it runs us.
pub(crate) fn cargo() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Cargo's target folder.
pub(crate) fn target(log: &Path) -> Result<PathBuf> {
    Ok(Workspace::read(log)?.target_directory)
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The checkout that xtask was built from.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::tool::Tool;

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
    let text = Tool::new(cargo(), log)
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .dir(root())
        .output()?;
    let metadata: serde_json::Value = serde_json::from_str(&text).context("cargo metadata")?;
    let folder = metadata.get("target_directory").and_then(serde_json::Value::as_str);
    Ok(PathBuf::from(folder.context("cargo metadata names no target_directory")?))
}

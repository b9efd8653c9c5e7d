// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask clean`: empties the cache, so that the next run takes the newest kernel.

use std::fs;

use anyhow::{Context as _, Result};

use crate::cache::Cache;
use crate::root;

/// Removes all that the cache holds, except for the lock that this run holds.
pub(crate) fn run() -> Result<()> {
    let cache = Cache::open()?;
    let lock = cache.lock()?;
    let log = cache.log("clean");
    for entry in
        fs::read_dir(cache.folder()).with_context(|| cache.folder().display().to_string())?
    {
        let entry = entry?;
        let name = entry.file_name();
        if name == "lock" || name == "logs" {
            continue;
        }
        // The roots belong to root.
        root::remove(&entry.path(), &log)?;
    }
    fs::remove_dir_all(cache.folder().join("logs")).context("logs")?;
    drop(lock);
    println!("{} is empty now", cache.folder().display());
    Ok(())
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Rust files of this project, for the checks of suite `style`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Calls `visit` with each Rust file below `folder` of `root`, in order: its path from `root` on,
/// and its text.
pub(crate) fn visit(
    root: &Path,
    folder: &Path,
    visit_file: &mut dyn FnMut(&Path, &str),
) -> Result<()> {
    let entries = fs::read_dir(root.join(folder)).with_context(|| folder.display().to_string())?;
    let mut paths = entries
        .map(|entry| Ok(folder.join(entry?.file_name())))
        .collect::<std::io::Result<Vec<PathBuf>>>()?;
    paths.sort();
    for path in paths {
        let full = root.join(&path);
        if full.is_dir() {
            visit(root, &path, visit_file)?;
        } else if path.extension().is_some_and(|end| end == "rs") {
            let text = fs::read_to_string(full).with_context(|| path.display().to_string())?;
            visit_file(&path, &text);
        }
    }
    Ok(())
}

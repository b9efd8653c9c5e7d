// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The files of this project, for the checks of suite `style`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Folders of build products.
const IGNORED: [&str; 2] = ["target", "node_modules"];

/// The files below `folder` of `root` whose names end in one of `ends`, in order: their paths from
/// `root` on, and their texts.
pub(crate) fn files(
    root: &Path,
    folder: impl AsRef<Path>,
    ends: &[&str],
) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    collect(root, folder.as_ref(), ends, &mut found)?;
    found.sort();
    Ok(found)
}

fn collect(
    root: &Path,
    folder: &Path,
    ends: &[&str],
    found: &mut Vec<(PathBuf, String)>,
) -> Result<()> {
    let entries = fs::read_dir(root.join(folder)).with_context(|| folder.display().to_string())?;
    for entry in entries {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            if !IGNORED.iter().any(|ignored| path.ends_with(ignored)) {
                collect(root, &path, ends, found)?;
            }
        } else if path.extension().is_some_and(|end| ends.iter().any(|one| end == *one)) {
            let text =
                fs::read_to_string(entry.path()).with_context(|| path.display().to_string())?;
            found.push((path, text));
        }
    }
    Ok(())
}

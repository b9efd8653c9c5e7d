// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The module's Rust files are formatted as the kernel formats its own: kernel/.rustfmt.toml.
//!
//! Each file is formatted by itself, from standard input: rustfmt would follow `mod` into the files
//! that the module shares with the crates, which have another style.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Fails where a file under `kernel` is not formatted, and names all of them.
pub(crate) fn check(kernel: &Path) -> Result<()> {
    let mut wrong = Vec::new();
    for folder in [kernel, &kernel.join("sys")] {
        for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "rs")
                && !is_formatted(kernel, &path)?
            {
                wrong.push(path.display().to_string());
            }
        }
    }
    wrong.sort();
    if wrong.is_empty() {
        return Ok(());
    }
    bail!(
        "not formatted; run `rustfmt --config-path kernel < FILE` and take its output:\n  {}",
        wrong.join("\n  ")
    )
}

fn is_formatted(kernel: &Path, path: &Path) -> Result<bool> {
    let name = || path.display().to_string();
    let file = File::open(path).with_context(name)?;
    let mut rustfmt = Command::new("rustfmt");
    rustfmt.arg("--config-path").arg(kernel).stdin(file);
    let output = rustfmt.output().context("rustfmt")?;
    if !output.status.success() {
        bail!("rustfmt fails on {}:\n{}", name(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout == fs::read(path).with_context(name)?)
}

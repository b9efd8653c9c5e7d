// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What peers need to know about a kernel, made from its dump: volatility3's symbol file from BTF
//! and kallsyms, and the text of the VMCOREINFO note.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use kvmmem_linux::identity::Identity;
use kvmmem_linux::{Find, Kernel};
use kvmmem_memory::DumpFile;

use crate::tool::Tool;

/// Converts these to a symbol file.
const SCRIPT: &str = include_str!("isf.py");

/// Where the kernel's text may lie; lower values of symbols are not addresses, but offsets in the
/// data of a CPU.
const TEXT: u64 = 0xffff_ffff_8000_0000;

/// The most bytes of the banner.
const BANNER: usize = 1024;

/// Writes the text of the note of the kernel in `core` to a file in `folder`; returns its path.
pub(super) fn note(core: &Path, folder: &Path) -> Result<PathBuf> {
    let memory = DumpFile::open(core)?;
    let path = folder.join("vmcoreinfo");
    fs::write(&path, Kernel::find(&memory, Find::default())?.note().text())?;
    Ok(path)
}

/// Writes the symbol file of the kernel in `core` to a folder of `folder`; returns that.
pub(super) fn symbols(core: &Path, folder: &Path, python: &Path, log: &Path) -> Result<PathBuf> {
    let memory = DumpFile::open(core)?;
    let kernel = Kernel::find(&memory, Find::default())?;
    let path = |name: &str| folder.join(name);
    let (start, end) = (kernel.symbol("__start_BTF")?, kernel.symbol("__stop_BTF")?);
    let mut types =
        vec![0; usize::try_from(end.checked_sub(start).context("the kernel has no BTF")?)?];
    kernel.read(start, &mut types)?;
    fs::write(path("btf"), types)?;
    // The file has the addresses that the kernel was linked at.
    let offset = Identity::of(&kernel)?.kaslr_offset;
    let lines = kernel.symbols()?.iter().map(|symbol| {
        let moved = if symbol.address >= TEXT { offset } else { 0 };
        format!("{:x} {}\n", symbol.address.wrapping_sub(moved), symbol.name)
    });
    fs::write(path("symbols"), lines.collect::<String>())?;
    let mut banner = kernel.read_cstr(kernel.symbol("linux_banner")?, BANNER)?;
    banner.push(0);
    fs::write(path("banner"), banner)?;
    fs::write(path("isf.py"), SCRIPT)?;
    let symbols = path("volatility");
    fs::create_dir_all(symbols.join("linux"))?;
    Tool::new(python, log)
        .args(["isf.py", "btf", "symbols", "banner"].map(path))
        .arg(symbols.join("linux/kernel.json"))
        .run()?;
    Ok(symbols)
}

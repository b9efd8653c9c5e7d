// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The core of a guest's process, against what the guest shows of its mappings.

use anyhow::{Context as _, Result, ensure};

use crate::linux::truth::Truth;

/// Mappings that lie together and allow the same, with their flags of a program header.
type Mappings = Vec<(u64, u64, u32)>;

/// The scene's process that does nothing.
pub(super) fn quiet(truth: &Truth) -> Result<u32> {
    let is_it = |(path, bytes): (&str, &[u8])| {
        let pid = path.strip_prefix("/proc/")?.strip_suffix("/cmdline")?.parse().ok()?;
        bytes.starts_with(b"stopped\0").then_some(pid)
    };
    truth.below("/proc/").find_map(is_it).context("the scene has no process that is stopped")
}

/// Compares the core of a process: its segments are the mappings, its first page is the program's,
/// and its thread was in user mode.
pub(super) fn compare(truth: &Truth, pid: u32, core: &[u8]) -> Result<()> {
    let shown = shown(&truth.text(&format!("/proc/{pid}/maps"))?)?;
    let loads = loads(core).context("the core's headers")?;
    let found =
        joined(loads.iter().map(|load| (load.address, load.address + load.len, load.flags)));
    ensure!(found == shown, "the core has {found:x?}, and the guest {shown:x?}");
    let first = loads.iter().find(|load| load.file_len > 0).context("nothing was in memory")?;
    ensure!(
        core.get(first.offset..).is_some_and(|bytes| bytes.starts_with(b"\x7fELF")),
        "no program is in it"
    );
    // Register 17 of the first thread, in the first note: CS of 64-bit user mode.
    let notes = usize::try_from(word(core, 64 + 8)?)?;
    let cs = word(core, notes + 20 + 112 + 17 * 8)?;
    ensure!(cs == 0x33, "the thread's CS is {cs:#x}");
    Ok(())
}

/// A program header of a core.
struct Load {
    flags: u32,
    offset: usize,
    address: u64,
    file_len: u64,
    len: u64,
}

fn loads(core: &[u8]) -> Result<Vec<Load>> {
    let count = word(core, 56)? & 0xffff;
    let mut loads = Vec::new();
    // The first one is of the notes.
    for number in 1..usize::try_from(count)? {
        let at = 64 + number * 56;
        loads.push(Load {
            flags: u32::try_from(word(core, at)? >> 32)?,
            offset: usize::try_from(word(core, at + 8)?)?,
            address: word(core, at + 16)?,
            file_len: word(core, at + 32)?,
            len: word(core, at + 40)?,
        });
    }
    Ok(loads)
}

fn word(core: &[u8], at: usize) -> Result<u64> {
    let bytes = core.get(at..).and_then(|bytes| bytes.first_chunk());
    bytes
        .map(|bytes| u64::from_le_bytes(*bytes))
        .with_context(|| format!("the core ends before {at:#x}"))
}

/// The lines of /proc/PID/maps, but for the kernel's own page.
fn shown(text: &str) -> Result<Mappings> {
    let mut all = Vec::new();
    for line in text.lines().filter(|line| !line.ends_with("[vsyscall]")) {
        let (start, rest) = line.split_once('-').context("a line without an address")?;
        let (end, rest) = rest.split_once(' ').context("a line without an end")?;
        let flag = |letter, flag| {
            if rest.get(..4).is_some_and(|all| all.contains(letter)) { flag } else { 0 }
        };
        let flags = flag('r', 4) | flag('w', 2) | flag('x', 1);
        all.push((u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?, flags));
    }
    Ok(joined(all.into_iter()))
}

fn joined(all: impl Iterator<Item = (u64, u64, u32)>) -> Mappings {
    let mut joined: Mappings = Vec::new();
    for (start, end, flags) in all {
        match joined.last_mut() {
            Some((_, last, same)) if *last == start && *same == flags => *last = end,
            _ => joined.push((start, end, flags)),
        }
    }
    joined
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checks a layout against the memory map that a VMM without firmware has left for the guest's
//! kernel: the start of the PVH boot protocol at 0x6000, or Linux's boot parameters at 0x7000.
//! Kernels keep what is below 1 MiB to themselves.

use crate::bytes::{u32_at, u64_at};

/// Where the RAM above the hole begins.
const FOUR_GIB: u64 = 1 << 32;

/// The first structure of PVH, what it begins with, and how much of it is read, bytes.
const PVH: u64 = 0x6000;
const PVH_MAGIC: u32 = 0x336e_c578;
const PVH_SIZE: usize = 56;

/// Linux's boot parameters, and places in them: the number of entries, the entries, what marks
/// them.
const PARAMETERS: u64 = 0x7000;
const PARAMETERS_SIZE: usize = 4096;
const COUNT: usize = 0x1e8;
const ENTRIES: usize = 0x2d0;
const MARK: usize = 0x202;

/// The most entries that are read.
const MAX_ENTRIES: usize = 128;

/// The kind of an entry that is RAM.
const RAM: u32 = 1;

/// Why a layout is not confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootMapError {
    /// There is no memory map: the guest has not been started yet, or has written over it.
    #[error("the memory map that the guest was started with is not found")]
    NotFound,
    /// There is another one.
    #[error("the guest was started with RAM up to {low_end:#x} and {high:#x} bytes above 4 GiB")]
    Other {
        /// Where low RAM ends.
        low_end: u64,
        /// RAM from 4 GiB on, bytes.
        high: u64,
    },
}

/// Confirms that the guest was started with RAM up to `low_end`, and with `high` bytes from 4 GiB
/// on. `read` copies guest-physical memory out.
pub fn verify(
    read: impl Fn(u64, &mut [u8]) -> Option<()>,
    low_end: u64,
    high: u64,
) -> Result<(), BootMapError> {
    let ram = pvh(&read).or_else(|| parameters(&read)).ok_or(BootMapError::NotFound)?;
    let ends = |ram: &[(u64, u64)], start: u64| {
        let ends =
            ram.iter().filter(|(gpa, _)| *gpa >= start).map(|(gpa, len)| gpa.saturating_add(*len));
        ends.max().unwrap_or(start)
    };
    let (below, above): (Vec<_>, Vec<_>) = ram.into_iter().partition(|(gpa, _)| *gpa < FOUR_GIB);
    let found = (ends(&below, 0), ends(&above, FOUR_GIB) - FOUR_GIB);
    match found {
        _ if found == (low_end, high) => Ok(()),
        (low_end, high) => Err(BootMapError::Other { low_end, high }),
    }
}

/// The RAM that PVH tells of: addresses and lengths.
fn pvh(read: &impl Fn(u64, &mut [u8]) -> Option<()>) -> Option<Vec<(u64, u64)>> {
    let mut start = [0; PVH_SIZE];
    read(PVH, &mut start)?;
    let count = usize::try_from(u32_at(&start, 48))
        .ok()
        .filter(|count| (1..=MAX_ENTRIES).contains(count))?;
    // The version must be one that has a memory map.
    (u32_at(&start, 0) == PVH_MAGIC && u32_at(&start, 4) >= 1).then_some(())?;
    let mut entries = vec![0; count * 24];
    read(u64_at(&start, 40), &mut entries)?;
    Some(ram(entries.chunks_exact(24)))
}

/// The RAM that Linux's boot parameters tell of.
fn parameters(read: &impl Fn(u64, &mut [u8]) -> Option<()>) -> Option<Vec<(u64, u64)>> {
    let mut page = vec![0; PARAMETERS_SIZE];
    read(PARAMETERS, &mut page)?;
    let count = usize::from(*page.get(COUNT)?);
    let is_it = page.get(MARK..)?.starts_with(b"HdrS") && (1..=MAX_ENTRIES).contains(&count);
    let entries = page.get(ENTRIES..)?.chunks_exact(20).take(count);
    is_it.then(|| ram(entries))
}

fn ram<'a>(entries: impl Iterator<Item = &'a [u8]>) -> Vec<(u64, u64)> {
    let is_ram = |entry: &&[u8]| u32_at(entry, 16) == RAM;
    entries.filter(is_ram).map(|entry| (u64_at(entry, 0), u64_at(entry, 8))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn entry(gpa: u64, len: u64, kind: u32) -> Vec<u8> {
        [&gpa.to_le_bytes()[..], &len.to_le_bytes(), &kind.to_le_bytes()].concat()
    }

    fn entries(low_end: u64, high: u64) -> Vec<Vec<u8>> {
        let mut entries = vec![entry(0, 0xa_0000, RAM), entry(0x10_0000, low_end - 0x10_0000, RAM)];
        if high > 0 {
            entries.push(entry(FOUR_GIB, high, RAM));
        }
        entries.push(entry(0xe800_0000, 0x1000_0000, 2));
        entries
    }

    fn put(memory: &mut [u8], at: usize, bytes: &[u8]) {
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn by_pvh(low_end: u64, high: u64) -> Vec<u8> {
        let mut memory = vec![0; 0x9000];
        let entries = entries(low_end, high);
        put(&mut memory, 0x6000, &PVH_MAGIC.to_le_bytes());
        put(&mut memory, 0x6004, &[1]);
        put(&mut memory, 0x6028, &0x7000u64.to_le_bytes());
        put(&mut memory, 0x6030, &[u8::try_from(entries.len()).unwrap()]);
        for (number, entry) in entries.iter().enumerate() {
            put(&mut memory, 0x7000 + number * 24, entry);
        }
        memory
    }

    fn by_parameters(low_end: u64, high: u64) -> Vec<u8> {
        let mut memory = vec![0; 0x9000];
        let entries = entries(low_end, high);
        put(&mut memory, 0x7000 + MARK, b"HdrS");
        put(&mut memory, 0x7000 + COUNT, &[u8::try_from(entries.len()).unwrap()]);
        put(&mut memory, 0x7000 + ENTRIES, &entries.concat());
        memory
    }

    fn ask(memory: &[u8], low_end: u64, high: u64) -> Result<(), BootMapError> {
        let read = |gpa: u64, bytes: &mut [u8]| {
            let start = usize::try_from(gpa).ok()?;
            bytes.copy_from_slice(memory.get(start..start.checked_add(bytes.len())?)?);
            Some(())
        };
        verify(read, low_end, high)
    }

    #[test]
    fn a_map_confirms_what_it_says_and_nothing_else() {
        for (low_end, high) in [(GIB, 0), (3 * GIB, 2 * GIB)] {
            for memory in [by_pvh(low_end, high), by_parameters(low_end, high)] {
                assert_eq!(ask(&memory, low_end, high), Ok(()));
                let other = Err(BootMapError::Other { low_end, high });
                assert_eq!(ask(&memory, low_end + 0x1000, high), other);
                assert_eq!(ask(&memory, low_end, high + GIB), other);
            }
        }
        assert_eq!(ask(&[0; 0x9000], GIB, 0), Err(BootMapError::NotFound));
        assert_eq!(ask(&[], GIB, 0), Err(BootMapError::NotFound));
    }

    proptest! {
        #[test]
        fn any_memory_is_read_without_harm(
            bytes in proptest::collection::vec(any::<u8>(), 1..64),
            at in prop::sample::select(vec![0x6000usize, 0x6028, 0x6030, 0x7000, 0x71e8, 0x72d0]),
            pvh: bool,
        ) {
            let mut memory = if pvh { by_pvh(GIB, GIB) } else { by_parameters(GIB, GIB) };
            put(&mut memory, at, &bytes);
            let _ = ask(&memory, GIB, GIB);
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where the guest-physical memory of a QEMU PC lies in the file of its RAM.
//!
//! Either QEMU says it, or the rules of the machine type do: RAM begins at 0, goes on at most to 4 GiB less a hole, and
//! the rest of the file begins at 4 GiB. How much is below the hole is decided by `pc_init1` in QEMU's
//! `hw/i386/pc_piix.c` and by `pc_q35_init` in `hw/i386/pc_q35.c`, the same in QEMU 2.4 to 11.1.
//!
//! From 0xa0000 to 0xc0000 is the VGA's window, with SMRAM behind it: it is left out. From there to 1 MiB the chipset lays
//! ROM over RAM and takes it away again, in pieces and at any time; what counts here is the RAM.

use super::mtree::FlatRange;
use crate::map::{PAGE_SIZE, Region};
use crate::qmp::{MemoryBackend, MemorySize};

/// Where the RAM above the hole begins.
const FOUR_GIB: u64 = 1 << 32;

/// The window of the VGA, and the end of what the chipset covers with ROM.
const VGA: u64 = 0xa_0000;
const ROM: u64 = 0xc_0000;
const ROM_END: u64 = 0x10_0000;

/// On AMD hosts QEMU moves what is above 4 GiB where it would reach the addresses that HyperTransport has near 1 TiB.
const MAX_BY_RULES: u64 = 900 << 30;

/// Why it is not known where the RAM lies.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// There are no rules for the machine.
    #[error("no rules are known for machine type {0:?}; give QEMU's QMP socket")]
    Machine(String),
    /// RAM could have been plugged in since.
    #[error("RAM may have been plugged in since the start (maxmem, DIMMs); give QEMU's QMP socket")]
    Growable,
    /// It is too much for the rules.
    #[error("{0:#x} bytes of RAM are too many for the rules; give QEMU's QMP socket")]
    Large(u64),
    /// No memory backend begins at address 0.
    #[error("what is at gpa 0 ({0:?}) is no memory backend")]
    NoBackend(String),
    /// The RAM's backend is not shared.
    #[error("memory backend {0:?} is not shared")]
    Private(String),
    /// RAM is in more than one backend.
    #[error("of {all:#x} bytes of RAM {first:#x} are in the first backend; only one backend is supported")]
    Several {
        /// RAM in all, bytes.
        all: u64,
        /// In the backend that begins at address 0, bytes.
        first: u64,
    },
}

/// The end of low RAM by the rules of a machine type, for `size` bytes in all.
///
/// # Errors
/// [`LayoutError`].
pub fn low_end(machine: &str, size: u64, max_below_4g: Option<u64>) -> Result<u64, LayoutError> {
    if size > MAX_BY_RULES {
        return Err(LayoutError::Large(size));
    }
    let low = if machine == "q35" || machine.starts_with("pc-q35-") {
        let low: u64 = if size >= 0xb000_0000 { 0x8000_0000 } else { 0xb000_0000 };
        low.min(max_below_4g.unwrap_or(FOUR_GIB))
    } else if machine == "pc" || machine.starts_with("pc-i440fx-") {
        let low = max_below_4g.unwrap_or(0xe000_0000);
        if size >= low { low.min(0xc000_0000) } else { low }
    } else {
        return Err(LayoutError::Machine(machine.to_owned()));
    };
    Ok(low.min(size))
}

/// The regions of `size` bytes of RAM of which the first `low` are below 4 GiB.
pub fn regions(low: u64, size: u64) -> Vec<Region> {
    let high = Region { gpa: FOUR_GIB, len: size.saturating_sub(low), offset: low, file: 0 };
    outside_of_vga(vec![Region { gpa: 0, len: low, offset: 0, file: 0 }, high])
}

/// The regions that QEMU says, and the size that the one file of all RAM must have.
///
/// # Errors
/// [`LayoutError`].
pub fn from_qemu(
    view: &[FlatRange],
    backends: &[MemoryBackend],
    memory: MemorySize,
) -> Result<(Vec<Region>, u64), LayoutError> {
    let first = view.iter().find(|range| range.gpa == 0 && range.is_memory);
    let name = first.map(|range| range.name.clone()).unwrap_or_default();
    let is_it = |backend: &&MemoryBackend| {
        let id = backend.id.as_deref().filter(|id| !id.is_empty());
        id.is_some_and(|id| name == id || name.strip_suffix(id).is_some_and(|path| path.ends_with('/')))
    };
    let backend = backends.iter().find(is_it).ok_or_else(|| LayoutError::NoBackend(name.clone()))?;
    if backend.share == Some(false) {
        return Err(LayoutError::Private(name));
    }
    let all = memory.base_memory.saturating_add(memory.plugged_memory);
    if all != backend.size {
        return Err(LayoutError::Several { all, first: backend.size });
    }
    let of_ram = view.iter().filter(|range| range.is_memory && range.name == name);
    let regions =
        of_ram.map(|range| Region { gpa: range.gpa, len: range.len, offset: range.offset, file: 0 });
    Ok((outside_of_vga(regions.collect()), backend.size))
}

/// Whole pages of the regions but for the VGA's window; RAM also where the chipset has laid ROM over it.
fn outside_of_vga(regions: Vec<Region>) -> Vec<Region> {
    let is_plain =
        |gpa: u64| regions.iter().any(|r| r.gpa == r.offset && (r.gpa..r.gpa + r.len).contains(&gpa));
    let covered = is_plain(VGA - 1) && is_plain(ROM_END);
    let below = regions.iter().filter_map(|region| cut(region, 0, VGA));
    let rom = covered.then_some(Region { gpa: ROM, len: ROM_END - ROM, offset: ROM, file: 0 });
    let above = regions.iter().filter_map(|region| cut(region, ROM_END, u64::MAX));
    let mut joined: Vec<Region> = Vec::new();
    for region in below.chain(rom).chain(above) {
        match joined.last_mut() {
            Some(last) if last.gpa + last.len == region.gpa && last.offset + last.len == region.offset => {
                last.len += region.len;
            }
            _ => joined.push(region),
        }
    }
    joined
}

/// The whole pages of a region between two addresses.
fn cut(region: &Region, start: u64, end: u64) -> Option<Region> {
    let gpa = region.gpa.max(start).checked_next_multiple_of(PAGE_SIZE)?;
    let end = region.gpa.checked_add(region.len)?.min(end) / PAGE_SIZE * PAGE_SIZE;
    let len = end.checked_sub(gpa).filter(|len| *len > 0)?;
    Some(Region { gpa, len, offset: region.offset.checked_add(gpa - region.gpa)?, ..*region })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::MemoryMap;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_rules_are_those_of_qemu() {
        let cases = [
            ("pc", 512 << 20, None, 512 << 20),
            ("pc", 3 * GIB, None, 3 * GIB),
            ("pc-i440fx-7.2", 0xdfff_0000, None, 0xdfff_0000),
            ("pc-i440fx-7.2", 0xe000_0000, None, 3 * GIB),
            ("pc-i440fx-2.4", 5 * GIB, None, 3 * GIB),
            ("pc", 4 * GIB, Some(2 * GIB), 2 * GIB),
            ("pc", 3968 << 20, Some(4 * GIB), 3968 << 20),
            ("q35", 512 << 20, None, 512 << 20),
            ("pc-q35-11.1", 0xafff_f000, None, 0xafff_f000),
            ("pc-q35-11.1", 0xb000_0000, None, 2 * GIB),
            ("q35", 5 * GIB, None, 2 * GIB),
            ("q35", 5 * GIB, Some(GIB), GIB),
        ];
        for (machine, size, limit, low) in cases {
            assert_eq!(low_end(machine, size, limit), Ok(low), "{machine} {size:#x}");
        }
        assert!(matches!(low_end("microvm", GIB, None), Err(LayoutError::Machine(_))));
        assert!(matches!(low_end("q35", 2 << 40, None), Err(LayoutError::Large(_))));
    }

    fn range(gpa: u64, end: u64, offset: u64, name: &str) -> FlatRange {
        FlatRange { gpa, len: end - gpa, is_memory: true, name: name.to_owned(), offset }
    }

    fn backend(id: &str, size: u64, share: bool) -> MemoryBackend {
        MemoryBackend { id: Some(id.to_owned()), size, share: Some(share) }
    }

    #[test]
    fn what_qemu_says_is_what_the_rules_say() {
        for name in ["mem", "/objects/mem"] {
            let view = [
                range(0, 0xc_3000, 0, name),
                range(0xc_3000, 0xe_8000, 0xc_3000, name),
                range(0xf_0000, 0x10_0000, 0, "pc.bios"),
                range(0x10_0000, 2 * GIB, 0x10_0000, name),
                range(0xfd00_0000, 0xfe00_0000, 0, "vga.vram"),
                range(4 * GIB, 7 * GIB, 2 * GIB, name),
            ];
            let memory = MemorySize { base_memory: 5 * GIB, plugged_memory: 0 };
            let (said, size) = from_qemu(&view, &[backend("mem", 5 * GIB, true)], memory).unwrap();
            assert_eq!(size, 5 * GIB);
            assert_eq!(said, regions(2 * GIB, 5 * GIB));
            assert_eq!(said.len(), 3);
            assert_eq!(MemoryMap::new(said).unwrap().resolve(4 * GIB), Some((0, 2 * GIB)));
        }
    }

    #[test]
    fn what_is_not_one_shared_backend_is_refused() {
        let view = [range(0, GIB, 0, "a"), range(GIB, 2 * GIB, 0, "b")];
        let memory = |base_memory, plugged_memory| MemorySize { base_memory, plugged_memory };
        let ask = |backends: &[MemoryBackend], memory| from_qemu(&view, backends, memory).unwrap_err();
        let (a, private) = (backend("a", GIB, true), backend("a", GIB, false));
        assert_eq!(ask(&[], memory(GIB, 0)), LayoutError::NoBackend("a".into()));
        assert_eq!(ask(&[private], memory(GIB, 0)), LayoutError::Private("a".into()));
        let several = |all| LayoutError::Several { all, first: GIB };
        assert_eq!(ask(std::slice::from_ref(&a), memory(2 * GIB, 0)), several(2 * GIB));
        assert_eq!(ask(&[a], memory(GIB, GIB)), several(2 * GIB));
    }

    proptest! {
        #[test]
        fn any_view_gives_a_map_or_an_error(
            numbers in proptest::collection::vec((0u64..0x200, 1u64..0x100, 0u64..0x200), 0..6),
            odd in 0u64..0x1000,
        ) {
            let mut end = 0;
            let mut view = Vec::new();
            for (gap, len, offset) in numbers {
                let gpa = if view.is_empty() { 0 } else { end + (gap << 12) + odd };
                end = gpa + (len << 12);
                view.push(range(gpa, end, (offset << 12) + odd, "m"));
            }
            let memory = MemorySize { base_memory: 1 << 21, plugged_memory: 0 };
            if let Ok((regions, _)) = from_qemu(&view, &[backend("m", 1 << 21, true)], memory) {
                prop_assert!(regions.iter().all(|r| r.gpa % 4096 == 0 && r.len % 4096 == 0 && r.len > 0));
                prop_assert!(regions.iter().all(|r| r.gpa + r.len <= VGA || r.gpa >= ROM));
                // The rest is the registry's to judge, which takes no map that breaks a rule.
                let _ = MemoryMap::new(regions);
            }
        }

        #[test]
        fn the_rules_make_maps(size in 512u64..0x40_0000, limit in proptest::option::of(0x1000u64..0x10_0000), q35: bool) {
            let (size, limit) = (size << 12, limit.map(|limit| limit << 12));
            let low = low_end(if q35 { "q35" } else { "pc" }, size, limit).unwrap();
            let map = MemoryMap::new(regions(low, size)).unwrap();
            prop_assert_eq!(map.memory_bytes(), size - (ROM - VGA));
            prop_assert!(map.file_size(0) == size);
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of one process of a Linux target: which parts of its mappings are in memory, as
//! segments of a core.

use anyhow::{Result, ensure};
use kvmmem_linux::maps::{Mapping, MemoryMap};
use kvmmem_linux::space::Extent;
use kvmmem_linux::{Space, SpaceError};
use kvmmem_memory::paging::WalkError;

use crate::range::{GpaRange, total};
use crate::unreadable;

/// The most segments of a core: their headers have 56 MiB then.
const MAX_SEGMENTS: usize = 1 << 20;

/// Flags of a segment.
const PF_X: u32 = 1;
const PF_W: u32 = 2;
const PF_R: u32 = 4;

/// Neighbouring addresses of a process that are all in memory, or all not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) addresses: GpaRange,
    /// Flags of the program header.
    pub(super) flags: u32,
    /// Whether it is in memory. The rest is in a file or in swap, or was never used.
    pub(super) is_present: bool,
}

/// The segments of all mappings that user mode has, ascending. `extents`, which ascend, are what is
/// in memory.
pub(super) fn segments(map: &MemoryMap, extents: &[Extent]) -> Result<Vec<Segment>> {
    let mut segments: Vec<Segment> = Vec::new();
    // The page of [vsyscall] is the kernel's.
    for mapping in map.mappings.iter().filter(|mapping| mapping.end <= 1 << 63) {
        let (first, flags) = (segments.len(), flags(mapping));
        let mut put = |addresses: GpaRange, is_present| match segments
            .get_mut(first..)
            .and_then(|new| new.last_mut())
        {
            _ if addresses.is_empty() => {}
            Some(last) if last.is_present == is_present => last.addresses.end = addresses.end,
            _ => segments.push(Segment { addresses, flags, is_present }),
        };
        let mut at = mapping.start;
        let from = extents.partition_point(|extent| extent.gva + extent.len <= mapping.start);
        for extent in extents.get(from..).unwrap_or_default() {
            let start = extent.gva.max(at);
            if start >= mapping.end {
                break;
            }
            put(at..start, false);
            at = (extent.gva + extent.len).min(mapping.end);
            put(start..at, true);
        }
        put(at..mapping.end, false);
        ensure!(segments.len() <= MAX_SEGMENTS, "its memory is in more than {MAX_SEGMENTS} pieces");
    }
    Ok(segments)
}

/// Reads as much as can be, page by page; what cannot be read is zeros. Returns how many bytes that
/// is.
///
/// # Errors
/// The one after which nothing can be read: the view has ended.
pub(super) fn read(space: &Space<'_>, gva: u64, buffer: &mut [u8]) -> Result<u64, SpaceError> {
    let read = |gva: u64, buffer: &mut [u8]| space.read(gva, buffer);
    Ok(total(&unreadable::read(gva, buffer, read, is_local)?.0))
}

/// Whether other addresses can still be read.
fn is_local(error: &SpaceError) -> bool {
    match error {
        WalkError::Page { source, .. } | WalkError::Table { source, .. } => source.is_local(),
        _ => true,
    }
}

fn flags(mapping: &Mapping) -> u32 {
    let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
    flag(mapping.is_readable(), PF_R)
        | flag(mapping.is_writable(), PF_W)
        | flag(mapping.is_executable(), PF_X)
}

#[cfg(test)]
mod tests {
    use kvmmem_memory::paging::{AddressSpace, Levels};
    use kvmmem_memory::{Memory, MemoryError, Range};

    use super::*;

    /// Tables that map eight pages from 0x1000 on, of which the one at gpa 0x2000 is lost; the view
    /// ends with the one at this address.
    struct Ram {
        ended_at: u64,
    }

    impl Memory for Ram {
        fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
            let range = gpa..gpa + buf.len() as u64;
            if range.contains(&self.ended_at) {
                return Err(MemoryError::Ended("the grant was revoked".into()));
            }
            if range.contains(&0x2000) {
                return Err(MemoryError::Unreadable { gpa, source: "bad sector".into() });
            }
            buf.fill(7);
            let mut put = |at: u64, word: u64| {
                if let Some(at) = at.checked_sub(gpa).and_then(|at| usize::try_from(at).ok())
                    && let Some(place) = buf.get_mut(at..at + 8)
                {
                    place.copy_from_slice(&word.to_le_bytes());
                }
            };
            for (table, next) in [(0xa000, 0xb000), (0xb000, 0xc000), (0xc000, 0xd000)] {
                put(table, next | 7);
            }
            (1..9).for_each(|page| put(0xd000 + 8 * page, page << 12 | 7));
            Ok(())
        }

        fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
            Ok(vec![Range { gpa: 0, len: 0x1_0000 }])
        }
    }

    #[test]
    fn a_page_that_cannot_be_read_is_zeros_and_the_end_of_the_view_is_an_error() {
        let root = AddressSpace { cr3: 0xa000, levels: Levels::Four };
        let mut buffer = vec![1; 0x4000];
        let ram = Ram { ended_at: u64::MAX };
        assert_eq!(read(&Space::new(&ram, root, 0), 0x1000, &mut buffer).unwrap(), 0x1000);
        let pages: Vec<u8> = buffer.chunks(0x1000).map(|page| page[0]).collect();
        assert_eq!(pages, [7, 0, 7, 7]);
        // In a page, and in a table.
        for ended_at in [0x3000, 0xd010] {
            let ram = Ram { ended_at };
            let error = read(&Space::new(&ram, root, 0), 0x1000, &mut buffer).unwrap_err();
            let error = format!("{:#}", anyhow::Error::from(error));
            assert!(error.ends_with("the grant was revoked"), "{ended_at:#x}: {error}");
        }
    }

    #[test]
    fn only_what_is_in_memory_has_bytes() {
        let mapping = |(start, end, flags)| Mapping { start, end, flags, ..Mapping::default() };
        // The last one is [vsyscall].
        let mappings = [
            (0x40_0000, 0x40_6000, 5),
            (0x40_6000, 0x60_0000, 3),
            (0x1000_0000_0000, 0x2000_0000_0000, 3),
            (0xffff_ffff_ff60_0000, 0xffff_ffff_ff60_1000, 4),
        ];
        let map =
            MemoryMap { mappings: mappings.map(mapping).into(), is_torn: false, is_cut: false };
        let extent = |gva, gpa, len| Extent { gva, gpa, len };
        // Pages that lie apart; one over the border of two mappings; one in none.
        let extents = [
            extent(0x3f_f000, 0x1_0000, 0x1000),
            extent(0x40_1000, 0x2_0000, 0x1000),
            extent(0x40_2000, 0x3_0000, 0x1000),
            extent(0x40_5000, 0x4_0000, 0x2000),
            extent(0x70_0000, 0x5_0000, 0x1000),
        ];
        let segment =
            |start, end, flags, is_present| Segment { addresses: start..end, flags, is_present };
        assert_eq!(
            segments(&map, &extents).unwrap(),
            [
                segment(0x40_0000, 0x40_1000, 5, false),
                segment(0x40_1000, 0x40_3000, 5, true),
                segment(0x40_3000, 0x40_5000, 5, false),
                segment(0x40_5000, 0x40_6000, 5, true),
                segment(0x40_6000, 0x40_7000, 6, true),
                segment(0x40_7000, 0x60_0000, 6, false),
                segment(0x1000_0000_0000, 0x2000_0000_0000, 6, false),
            ]
        );
        assert_eq!(segments(&map, &[]).unwrap().len(), 3);
    }
}

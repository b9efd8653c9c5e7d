// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory map of a VM: which guest-physical addresses are RAM, and where they lie in the RAM's
//! files.

use serde::{Deserialize, Serialize};

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// The most regions that a memory map may have.
pub const MAX_REGIONS: usize = 64;

/// The most files that a VM's RAM may lie in: one per NUMA node or DIMM.
pub const MAX_FILES: usize = 16;

/// What makes QEMU's RAM such that others can map it.
pub const SHARE_IT: &str = "to let others map it, start QEMU with -object memory-backend-memfd,id=mem,size=SIZE,share=on \
    -machine memory-backend=mem (libvirt: <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>)";

/// The end of guest-physical memory: x86-64 has at most 52 address bits.
pub const GPA_END: u64 = 1 << 52;

/// A range of RAM. Address, length and offset are bytes and multiples of the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length.
    pub len: u64,
    /// Place of the first byte in its file.
    pub offset: u64,
    /// Which of the RAM's files that is, below [`MAX_FILES`]. Peers that know of one file alone
    /// leave it out.
    #[serde(default, skip_serializing_if = "is_first")]
    pub file: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_first(file: &u32) -> bool {
    *file == 0
}

/// Why a list of regions is not a memory map.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// There is no region at all.
    #[error("memory map has no region")]
    Empty,
    /// There are more than [`MAX_REGIONS`].
    #[error("memory map has {0} regions, at most {MAX_REGIONS} are taken")]
    TooMany(usize),
    /// A region is empty or not page-aligned.
    #[error("region at gpa {:#x} (length {:#x}, offset {:#x}) is empty or not page-aligned", .0.gpa, .0.len, .0.offset)]
    Alignment(Region),
    /// A region ends beyond the physical address space or the largest file.
    #[error("region at gpa {:#x} (length {:#x}, offset {:#x}) ends out of range", .0.gpa, .0.len, .0.offset)]
    Range(Region),
    /// A region lies in a file whose number is too high.
    #[error("region at gpa {:#x} is in file {}, at most {MAX_FILES} are taken", .0.gpa, .0.file)]
    File(Region),
    /// A region starts before the end of the one listed before it.
    #[error("region at gpa {:#x} overlaps or precedes the one listed before it", .0.gpa)]
    Order(Region),
    /// Two regions share bytes of a file.
    #[error("region at gpa {:#x} (file {}, offset {:#x}) shares memory with another", .0.gpa, .0.file, .0.offset)]
    Alias(Region),
}

/// Regions that are aligned, sorted by address, disjoint in addresses and in each file, and bounded
/// in number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    regions: Vec<Region>,
}

impl MemoryMap {
    /// Checks the regions.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn new(regions: Vec<Region>) -> Result<Self, MapError> {
        if regions.is_empty() {
            return Err(MapError::Empty);
        }
        if regions.len() > MAX_REGIONS {
            return Err(MapError::TooMany(regions.len()));
        }
        let mut end = 0;
        for region in &regions {
            if region.len == 0 || (region.gpa | region.len | region.offset) % PAGE_SIZE != 0 {
                return Err(MapError::Alignment(*region));
            }
            let gpa_end = region.gpa.checked_add(region.len).filter(|end| *end <= GPA_END);
            let file_end =
                region.offset.checked_add(region.len).filter(|end| i64::try_from(*end).is_ok());
            let (Some(gpa_end), Some(_)) = (gpa_end, file_end) else {
                return Err(MapError::Range(*region));
            };
            if usize::try_from(region.file).is_ok_and(|file| file >= MAX_FILES) {
                return Err(MapError::File(*region));
            }
            if region.gpa < end {
                return Err(MapError::Order(*region));
            }
            end = gpa_end;
        }
        let mut by_place: Vec<&Region> = regions.iter().collect();
        by_place.sort_unstable_by_key(|region| (region.file, region.offset));
        for (before, after) in by_place.iter().zip(by_place.iter().skip(1)) {
            if before.file == after.file && before.offset + before.len > after.offset {
                return Err(MapError::Alias(**after));
            }
        }
        Ok(Self { regions })
    }

    /// The regions, by ascending address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The file that holds guest-physical address `gpa`, and the offset in it; `None` in a hole.
    pub fn resolve(&self, gpa: u64) -> Option<(u32, u64)> {
        self.region_of(gpa).map(|region| (region.file, region.offset + (gpa - region.gpa)))
    }

    /// The region that holds guest-physical address `gpa`; `None` in a hole.
    pub fn region_of(&self, gpa: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|region| region.gpa <= gpa);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (gpa - region.gpa < region.len).then_some(region)
    }

    /// The guest frame number behind the last one that is RAM.
    pub fn end_gfn(&self) -> u64 {
        self.regions.last().map_or(0, |region| (region.gpa + region.len) / PAGE_SIZE)
    }

    /// How many files there must be.
    pub fn file_count(&self) -> usize {
        let count =
            |region: &Region| usize::try_from(region.file).unwrap_or(usize::MAX).saturating_add(1);
        self.regions.iter().map(count).max().unwrap_or(0)
    }

    /// The least size that a file must have, bytes; 0 for one that holds nothing.
    pub fn file_size(&self, file: u32) -> u64 {
        let within = self.regions.iter().filter(|region| region.file == file);
        within.map(|region| region.offset + region.len).max().unwrap_or(0)
    }

    /// RAM in all, bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn region(gpa: u64, len: u64, offset: u64) -> Region {
        Region { gpa, len, offset, file: 0 }
    }

    #[test]
    fn a_map_with_a_hole_resolves() {
        let map =
            MemoryMap::new(vec![region(0, 0x3000, 0x1000), region(0x10_0000, 0x1000, 0x8000)])
                .unwrap();
        assert_eq!(map.resolve(0), Some((0, 0x1000)));
        assert_eq!(map.resolve(0x2fff), Some((0, 0x3fff)));
        assert_eq!(map.resolve(0x3000), None);
        assert_eq!(map.resolve(0x10_0fff), Some((0, 0x8fff)));
        assert_eq!(map.resolve(0x10_1000), None);
        assert_eq!(map.resolve(u64::MAX), None);
        assert_eq!(map.end_gfn(), 0x101);
        assert_eq!((map.file_count(), map.file_size(0), map.file_size(1)), (1, 0x9000, 0));
        assert_eq!(map.memory_bytes(), 0x4000);
    }

    #[test]
    fn each_file_has_offsets_of_its_own() {
        let node = |gpa, file| Region { file, ..region(gpa, 0x2000, 0x1000) };
        let map = MemoryMap::new(vec![node(0, 2), node(0x2000, 0)]).unwrap();
        assert_eq!(
            (map.resolve(0x1000), map.resolve(0x3000)),
            (Some((2, 0x2000)), Some((0, 0x2000)))
        );
        assert_eq!((map.file_count(), map.file_size(1), map.file_size(2)), (3, 0, 0x3000));
        assert!(matches!(
            MemoryMap::new(vec![node(0, 2), node(0x2000, 2)]),
            Err(MapError::Alias(_))
        ));
    }

    #[test]
    fn a_region_without_a_file_is_in_the_first() {
        let read: Region = serde_json::from_str(r#"{"gpa":0,"len":4096,"offset":8192}"#).unwrap();
        assert_eq!(read, region(0, 4096, 8192));
        assert_eq!(serde_json::to_string(&read).unwrap(), r#"{"gpa":0,"len":4096,"offset":8192}"#);
        let second = Region { file: 1, ..read };
        assert_eq!(
            serde_json::from_str::<Region>(&serde_json::to_string(&second).unwrap()).unwrap(),
            second
        );
    }

    #[test]
    fn bad_maps_are_refused() {
        type Check = fn(&MapError) -> bool;
        let cases: Vec<(Vec<Region>, Check)> = vec![
            (vec![], |e| matches!(e, MapError::Empty)),
            ((0..65).map(|n| region(n << 12, 4096, n << 12)).collect(), |e| {
                matches!(e, MapError::TooMany(65))
            }),
            (vec![region(0, 0, 0)], |e| matches!(e, MapError::Alignment(_))),
            (vec![region(1, 4096, 0)], |e| matches!(e, MapError::Alignment(_))),
            (vec![region(0, 4097, 0)], |e| matches!(e, MapError::Alignment(_))),
            (vec![region(0, 4096, 8)], |e| matches!(e, MapError::Alignment(_))),
            (vec![region(!0xfff, 0x1000, 0)], |e| matches!(e, MapError::Range(_))),
            (vec![region(0, 0x1000, !0xfff)], |e| matches!(e, MapError::Range(_))),
            (vec![region(0, 0x2000, 0), region(0x1000, 0x1000, 0x2000)], |e| {
                matches!(e, MapError::Order(_))
            }),
            (vec![region(0x1000, 0x1000, 0), region(0, 0x1000, 0x2000)], |e| {
                matches!(e, MapError::Order(_))
            }),
            (vec![region(0, 0x2000, 0), region(0x2000, 0x1000, 0x1000)], |e| {
                matches!(e, MapError::Alias(_))
            }),
            (vec![Region { file: 16, ..region(0, 0x1000, 0) }], |e| matches!(e, MapError::File(_))),
            (vec![Region { file: u32::MAX, ..region(0, 0x1000, 0) }], |e| {
                matches!(e, MapError::File(_))
            }),
        ];
        for (regions, check) in cases {
            let error = MemoryMap::new(regions.clone()).unwrap_err();
            assert!(check(&error), "{regions:x?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_accepted_map_resolves_like_a_search(
            numbers in proptest::collection::vec((0u64..64, 0u64..16, 0u64..64, 0u32..3), 0..6),
            gpa in 0u64..0x50_000,
        ) {
            let regions: Vec<Region> =
                numbers.iter().map(|(gpa, len, offset, file)| Region { file: *file, ..region(gpa << 12, len << 12, offset << 12) }).collect();
            if let Ok(map) = MemoryMap::new(regions.clone()) {
                let found = regions.iter().find(|r| (r.gpa..r.gpa + r.len).contains(&gpa));
                prop_assert_eq!(map.resolve(gpa), found.map(|r| (r.file, r.offset + (gpa - r.gpa))));
                prop_assert!(map.resolve((map.end_gfn() << 12) - 1).is_some());
                prop_assert!(map.resolve(map.end_gfn() << 12).is_none());
            }
        }

        #[test]
        fn any_numbers_are_taken_or_refused(numbers in proptest::collection::vec(any::<(u64, u64, u64)>(), 0..4), gpa: u64) {
            let regions = numbers.into_iter().map(|(gpa, len, offset)| region(gpa, len, offset)).collect();
            if let Ok(map) = MemoryMap::new(regions) {
                let _ = map.resolve(gpa);
                prop_assert!(map.file_size(0) > 0);
            }
        }
    }
}

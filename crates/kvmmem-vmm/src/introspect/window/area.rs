// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Allocator of guest-physical address space for windows, above RAM and devices and below the end
//! of the guest's physical addresses.

use std::collections::BTreeMap;

use kvmmem_client::vmm::Region;
use kvmmem_sys::ram::HOLE_END;
use kvmmem_sys::window::{GIANT_PAGE, LARGE_PAGE, alignment};

/// 12 GiB below 1 TiB that AMD's CPUs keep for HyperTransport.
const HYPERTRANSPORT: (u64, u64) = (0xfd_0000_0000, 0x100_0000_0000);

/// Which parts of the space are taken. First fit from below: Linux lets no unprivileged process map
/// the upper half of physical memory on CPUs that are open to L1TF.
#[derive(Debug)]
pub(crate) struct Area {
    start: u64,
    end: u64,
    /// First address and end of what is taken; disjoint.
    taken: BTreeMap<u64, u64>,
}

impl Area {
    /// The space of a machine whose RAM ends at `ram_end` and whose physical addresses have
    /// `address_bits` bits.
    pub(crate) fn new(ram_end: u64, address_bits: u32) -> Self {
        let start = ram_end.max(HOLE_END).next_multiple_of(GIANT_PAGE);
        let end = 1u64.checked_shl(address_bits.min(52)).unwrap_or(0).max(start);
        Self { start, end, taken: BTreeMap::from([HYPERTRANSPORT]) }
    }

    /// First address of the space.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Takes `len` bytes, in whole large pages, at a multiple of `alignment`, a power of two;
    /// `None` when they do not fit.
    pub(crate) fn take(&mut self, len: u64, alignment: u64) -> Option<u64> {
        let len = len.max(1).checked_next_multiple_of(LARGE_PAGE)?;
        let alignment = alignment.max(LARGE_PAGE);
        let mut at = self.start.checked_next_multiple_of(alignment)?;
        for (&start, &end) in &self.taken {
            if at.checked_add(len)? <= start {
                break;
            }
            if end > at {
                at = end.checked_next_multiple_of(alignment)?;
            }
        }
        let end = at.checked_add(len).filter(|end| *end <= self.end)?;
        self.taken.insert(at, end);
        Some(at)
    }

    /// Makes what [`Area::take`] returned as `at` at least `len` bytes long, if there is room
    /// behind it.
    pub(crate) fn grow(&mut self, at: u64, len: u64) -> bool {
        let end = len.checked_next_multiple_of(LARGE_PAGE).and_then(|len| at.checked_add(len));
        let Some(end) = end.filter(|end| *end <= self.end) else {
            return false;
        };
        let next = self.taken.range(at.saturating_add(1)..).next().map(|(&start, _)| start);
        match self.taken.get_mut(&at) {
            Some(_) if next.is_some_and(|next| end > next) => false,
            Some(old) => {
                *old = end.max(*old);
                true
            }
            None => false,
        }
    }

    /// Gives back what [`Area::take`] returned as `at`.
    pub(crate) fn give_back(&mut self, at: u64) {
        self.taken.remove(&at);
    }
}

/// Where regions are, relative to the start of a view's part of the space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The regions' offsets, in their order.
    pub(crate) offsets: Vec<u64>,
    /// The end of the last one.
    pub(crate) len: u64,
    /// The alignment of the part's start.
    pub(crate) alignment: u64,
}

/// Places `regions` one behind the other from offset `from` on, each congruent to its place in its
/// file modulo the largest page that fits in it, so that large pages of the file are large pages of
/// the guest; `None` beyond 2^64.
///
/// A start that is not a multiple of [`Layout::alignment`] loses that.
pub(crate) fn lay_out(regions: &[Region], from: u64) -> Option<Layout> {
    let mut layout =
        Layout { offsets: Vec::with_capacity(regions.len()), len: from, alignment: LARGE_PAGE };
    for region in regions {
        let alignment = alignment(region.len);
        let gap = region.offset.wrapping_sub(layout.len) & (alignment - 1);
        let offset = layout.len.checked_add(gap)?;
        layout.offsets.push(offset);
        layout.len = offset.checked_add(region.len)?;
        layout.alignment = layout.alignment.max(alignment);
    }
    Some(layout)
}

#[cfg(test)]
mod tests {
    use kvmmem_sys::ram::PAGE_SIZE;
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = GIANT_PAGE;

    #[test]
    fn the_space_is_above_ram_and_below_the_last_address() {
        let mut area = Area::new(6 * GIB + 4096, 34);
        assert_eq!(area.start(), 7 * GIB);
        assert_eq!(area.take(1, 4096), Some(7 * GIB));
        assert_eq!(area.take(2 * GIB, GIB), Some(8 * GIB));
        assert_eq!(area.take(6 * GIB + 1, GIB), None);
        assert_eq!(area.take(6 * GIB, GIB), Some(10 * GIB));
        // What is left is below the first large one.
        assert_eq!(area.take(GIB, LARGE_PAGE), None);
        assert_eq!(area.take(GIB - LARGE_PAGE, LARGE_PAGE), Some(7 * GIB + LARGE_PAGE));
        assert_eq!(area.take(1, 1), None);
        area.give_back(8 * GIB);
        assert_eq!(area.take(2 * GIB, LARGE_PAGE), Some(8 * GIB));
        // A machine without any address left.
        assert_eq!(Area::new(1 << 40, 36).take(1, 1), None);
        assert_eq!(Area::new(0, 0).take(1, 1), None);
        assert_eq!(Area::new(0, 52).take(u64::MAX, GIB), None);
    }

    #[test]
    fn hypertransport_is_left_out() {
        let (start, end) = HYPERTRANSPORT;
        let mut area = Area::new(0, 48);
        assert_eq!(area.take(start - area.start(), GIB), Some(4 * GIB));
        assert_eq!(area.take(1, GIB), Some(end));
    }

    #[test]
    fn a_part_grows_into_free_space_alone() {
        let mut area = Area::new(0, 36);
        let first = area.take(GIB, GIB).unwrap();
        assert!(area.grow(first, 2 * GIB));
        let second = area.take(GIB, GIB).unwrap();
        assert_eq!(second, first + 2 * GIB);
        assert!(!area.grow(first, 2 * GIB + 1));
        assert!(area.grow(first, GIB));
        assert!(
            !area.grow(second, u64::MAX)
                && !area.grow(second, 64 * GIB)
                && !area.grow(second + 1, GIB)
        );
        area.give_back(first);
        assert_eq!(area.take(2 * GIB, GIB), Some(first));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take { len: u64, alignment: u64 },
        Grow { index: usize, len: u64 },
        GiveBack { index: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        let len = || prop_oneof![0..4 * LARGE_PAGE, 0..4 * GIB];
        prop_oneof![
            4 => (len(), prop_oneof![Just(LARGE_PAGE), Just(GIB)])
                .prop_map(|(len, alignment)| Step::Take { len, alignment }),
            1 => (any::<usize>(), len()).prop_map(|(index, len)| Step::Grow { index, len }),
            2 => any::<usize>().prop_map(|index| Step::GiveBack { index }),
        ]
    }

    proptest! {
        /// What is taken is disjoint, aligned and within the space; and all of it can be had once
        /// all was given back.
        #[test]
        fn parts_never_overlap(steps in prop::collection::vec(step(), 1..60)) {
            let mut area = Area::new(0, 34);
            let mut parts: Vec<(u64, u64)> = Vec::new();
            for step in steps {
                match step {
                    Step::Take { len, alignment } => {
                        if let Some(at) = area.take(len, alignment) {
                            prop_assert_eq!(at % alignment, 0);
                            parts.push((at, at + len));
                        }
                    }
                    Step::Grow { index, len } if !parts.is_empty() => {
                        let index = index % parts.len();
                        let (at, end) = parts[index];
                        if area.grow(at, len) {
                            parts[index] = (at, end.max(at + len));
                        }
                    }
                    Step::GiveBack { index } if !parts.is_empty() => {
                        let (at, _) = parts.swap_remove(index % parts.len());
                        area.give_back(at);
                    }
                    Step::Grow { .. } | Step::GiveBack { .. } => {}
                }
                let mut sorted = parts.clone();
                sorted.sort_unstable();
                prop_assert!(sorted.iter().all(|(at, end)| *at >= 4 * GIB && *end <= 16 * GIB));
                prop_assert!(sorted.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{sorted:?}");
            }
            for (at, _) in parts {
                area.give_back(at);
            }
            prop_assert_eq!(area.take(12 * GIB, GIB), Some(4 * GIB));
        }

        /// Regions keep their order and their alignment, at any place in the area.
        #[test]
        fn regions_are_congruent_to_their_files(
            regions in prop::collection::vec((1..8 * GIB / PAGE_SIZE, 0..1u64 << 30), 0..20),
            from in 0..1u64 << 30,
        ) {
            let regions: Vec<Region> = regions
                .into_iter()
                .map(|(pages, page)| Region { gpa: 0, len: pages * PAGE_SIZE, offset: page * PAGE_SIZE, file: 0 })
                .collect();
            let from = from * PAGE_SIZE;
            let layout = lay_out(&regions, from).unwrap();
            let mut end = from;
            for (region, &offset) in regions.iter().zip(&layout.offsets) {
                let alignment = alignment(region.len);
                prop_assert!(offset >= end && offset - end < alignment);
                prop_assert_eq!(offset % alignment, region.offset % alignment);
                prop_assert!(alignment <= layout.alignment);
                end = offset + region.len;
            }
            prop_assert_eq!((layout.len, layout.offsets.len()), (end, regions.len()));
        }
    }
}

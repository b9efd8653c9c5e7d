// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ranges of guest-physical memory.

use std::fmt;

/// Bytes of the smallest page.
pub const PAGE_SIZE: usize = 4096;

/// A stretch of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Range {
    /// The address after the last one; the highest address there is, where that does not exist.
    pub fn end(&self) -> u64 {
        self.gpa.saturating_add(self.len)
    }

    /// Whether it is a positive number of whole pages.
    pub fn is_pages(&self) -> bool {
        self.len > 0
            && self.gpa.is_multiple_of(PAGE_SIZE as u64)
            && self.len.is_multiple_of(PAGE_SIZE as u64)
            && self.gpa.checked_add(self.len).is_some()
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.gpa, self.end())
    }
}

/// The first address of `range` that none of `ranges` has; they are disjoint and ascend.
pub fn first_hole(ranges: &[Range], range: Range) -> Option<u64> {
    let mut at = range.gpa;
    for known in ranges.iter().filter(|known| known.end() > range.gpa) {
        if at >= range.end() || known.gpa > at {
            break;
        }
        at = known.end();
    }
    (at < range.end()).then_some(at)
}

/// The part of the first of `ranges` at or after `gpa`; they are disjoint and ascend.
pub fn next_range(ranges: &[Range], gpa: u64) -> Option<Range> {
    let range = ranges.iter().find(|range| range.end() > gpa)?;
    let start = range.gpa.max(gpa);
    Some(Range { gpa: start, len: range.end() - start })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ascending, disjoint ranges, some of them adjacent.
    fn ranges() -> impl Strategy<Value = Vec<Range>> {
        proptest::collection::vec((0u64..3, 1u64..4), 0..6).prop_map(|numbers| {
            let mut end = 0;
            let next = |(gap, len)| {
                let range = Range { gpa: end + gap, len };
                end = range.end();
                range
            };
            numbers.into_iter().map(next).collect()
        })
    }

    proptest! {
        #[test]
        fn holes_and_next_ranges_are_those_of_a_search(ranges in ranges(), gpa in 0u64..32, len in 1u64..16) {
            let has = |at: &u64| ranges.iter().any(|range| (range.gpa..range.end()).contains(at));
            prop_assert_eq!(first_hole(&ranges, Range { gpa, len }), (gpa..gpa + len).find(|at| !has(at)));
            let next = next_range(&ranges, gpa);
            prop_assert_eq!(next.map(|range| range.gpa), (gpa..40).find(has));
            if let Some(range) = next {
                prop_assert!((range.gpa..range.end()).all(|at| has(&at)));
            }
        }
    }

    #[test]
    fn only_whole_pages_are_pages() {
        assert!(Range { gpa: 0x1000, len: 0x2000 }.is_pages());
        for (gpa, len) in [(0, 0), (1, 0x1000), (0x1000, 1), (!0xfff, 0x1000), (!0xfff, 0x2000)] {
            assert!(!Range { gpa, len }.is_pages(), "{gpa:#x} {len:#x}");
        }
        assert_eq!(first_hole(&[], Range { gpa: !0xfff, len: 0x2000 }), Some(!0xfff));
    }
}

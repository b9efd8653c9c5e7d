// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a grant allows: rights, and guest-physical addresses.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::map::{GPA_END, MAX_REGIONS, MemoryMap, PAGE_SIZE, Region};

/// The most spans of a scope, and the most pieces of RAM that it may cut out of a target's memory
/// map.
pub const MAX_SPANS: usize = 64;

/// Whether memory may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rights {
    /// Reading alone.
    #[serde(rename = "ro")]
    ReadOnly,
    /// Reading and writing.
    #[serde(rename = "rw")]
    ReadWrite,
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadOnly => "ro",
            Self::ReadWrite => "rw",
        })
    }
}

/// Guest-physical addresses `gpa` to `gpa + len`, both multiples of the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// First address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Span {
    /// The address behind the last one, where the span does not wrap.
    fn end(self) -> Option<u64> {
        self.gpa.checked_add(self.len)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.end() {
            Some(end) => write!(f, "{:#x}..{end:#x}", self.gpa),
            None => write!(f, "{:#x} (length {:#x})", self.gpa, self.len),
        }
    }
}

/// What a grant allows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    /// Whether memory may be written.
    pub rights: Rights,
    /// Where: ascending and disjoint. `None` for all RAM, also that which the target gets later.
    pub spans: Option<Vec<Span>>,
}

/// Why spans are not a scope of a target's memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// The list of spans is empty.
    #[error("no range is given; leave the ranges out to grant all RAM")]
    Empty,
    /// There are more than [`MAX_SPANS`].
    #[error("{0} ranges are given, at most {MAX_SPANS} are taken; grant the others separately")]
    TooMany(usize),
    /// A span is empty or not page-aligned.
    #[error(
        "range {0} is empty or not page-aligned; both ends must be multiples of {PAGE_SIZE:#x}"
    )]
    Alignment(Span),
    /// A span wraps or ends behind the last guest-physical address.
    #[error("range {0} ends out of range; guest-physical addresses end at {GPA_END:#x}")]
    Range(Span),
    /// A span starts before the end of the one listed before it.
    #[error(
        "range {0} overlaps or precedes the one listed before it; list disjoint ranges in ascending order"
    )]
    Order(Span),
    /// A span holds none of the target's RAM.
    #[error("range {span} holds none of the target's RAM, which is {ram}")]
    NoRam {
        /// The span.
        span: Span,
        /// Where there is RAM.
        ram: String,
    },
    /// The spans cut the target's RAM into more than [`MAX_SPANS`] pieces.
    #[error(
        "the ranges cut the target's RAM into {0} pieces, at most {MAX_SPANS} are taken; grant fewer ranges at a time"
    )]
    Pieces(usize),
    /// More than [`MAX_SPANS`] spans are to be reached.
    #[error("{0} ranges are to be reached, at most {MAX_SPANS} are checked; name fewer")]
    TooManyToReach(usize),
    /// A span that is to be reached holds no memory that the scope allows.
    #[error(
        "range {span} holds no memory that the token opens, which is {ram}; the token was not used"
    )]
    NotReached {
        /// The span.
        span: Span,
        /// Where there is memory.
        ram: String,
    },
}

impl Scope {
    /// All RAM.
    pub const fn whole(rights: Rights) -> Self {
        Self { rights, spans: None }
    }

    /// The same place with no more rights than `rights`.
    #[must_use]
    pub fn at_most(&self, rights: Rights) -> Self {
        let rights = if rights == Rights::ReadOnly { rights } else { self.rights };
        Self { rights, spans: self.spans.clone() }
    }

    /// Checks the spans by themselves and against a target's memory.
    ///
    /// # Errors
    /// [`ScopeError`] names the span.
    pub fn check(&self, map: &MemoryMap) -> Result<(), ScopeError> {
        let Some(spans) = &self.spans else { return Ok(()) };
        if spans.is_empty() {
            return Err(ScopeError::Empty);
        }
        if spans.len() > MAX_SPANS {
            return Err(ScopeError::TooMany(spans.len()));
        }
        let mut end = 0;
        for span in spans {
            if span.len == 0 || (span.gpa | span.len) % PAGE_SIZE != 0 {
                return Err(ScopeError::Alignment(*span));
            }
            let span_end =
                span.end().filter(|end| *end <= GPA_END).ok_or(ScopeError::Range(*span))?;
            if span.gpa < end {
                return Err(ScopeError::Order(*span));
            }
            end = span_end;
            if !map.regions().iter().any(|region| common(*span, region).is_some()) {
                return Err(ScopeError::NoRam { span: *span, ram: places(map.regions()) });
            }
        }
        match self.regions(map).len() {
            pieces if pieces > MAX_SPANS => Err(ScopeError::Pieces(pieces)),
            _ => Ok(()),
        }
    }

    /// Checks that each of `spans`, which are in any order, holds some of the target's memory that
    /// the scope reaches.
    ///
    /// # Errors
    /// [`ScopeError::NotReached`] names the span, [`ScopeError::TooManyToReach`].
    pub fn check_reaches(&self, spans: &[Span], map: &MemoryMap) -> Result<(), ScopeError> {
        if spans.len() > MAX_SPANS {
            return Err(ScopeError::TooManyToReach(spans.len()));
        }
        let regions = self.regions(map);
        let is_reached = |span: &Span| regions.iter().any(|region| common(*span, region).is_some());
        match spans.iter().find(|span| !is_reached(span)) {
            Some(span) => Err(ScopeError::NotReached { span: *span, ram: places(&regions) }),
            None => Ok(()),
        }
    }

    /// The RAM that the scope reaches, by ascending address. A map that has changed since
    /// [`Self::check`] may give more than [`MAX_SPANS`] pieces, or none.
    pub fn regions(&self, map: &MemoryMap) -> Vec<Region> {
        let Some(spans) = &self.spans else { return map.regions().to_vec() };
        let pieces = |span: &Span| {
            let span = *span;
            map.regions().iter().filter_map(move |region| common(span, region))
        };
        spans.iter().flat_map(pieces).collect()
    }

    /// Whether guest-physical address `gpa` is within the scope, be it RAM or not.
    pub fn contains(&self, gpa: u64) -> bool {
        let within =
            |span: &Span| gpa.checked_sub(span.gpa).is_some_and(|offset| offset < span.len);
        self.spans.as_ref().is_none_or(|spans| spans.iter().any(within))
    }
}

/// The part of a region that lies in a span.
fn common(span: Span, region: &Region) -> Option<Region> {
    let start = span.gpa.max(region.gpa);
    let end = span.end()?.min(region.gpa.checked_add(region.len)?);
    let len = end.checked_sub(start).filter(|len| *len > 0)?;
    Some(Region { gpa: start, len, offset: region.offset + (start - region.gpa), ..*region })
}

/// Where memory is, in words.
fn places(regions: &[Region]) -> String {
    const SHOWN: usize = 4;
    if regions.is_empty() {
        return "nowhere".to_owned();
    }
    let mut words: Vec<String> =
        regions.iter().take(SHOWN).map(|r| Span { gpa: r.gpa, len: r.len }.to_string()).collect();
    if regions.len() > SHOWN {
        words.push(format!("{} more", regions.len() - SHOWN));
    }
    format!("at {}", words.join(", "))
}

const _: () = assert!(MAX_REGIONS <= MAX_SPANS);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map() -> MemoryMap {
        let region = |gpa, len| Region { gpa, len, offset: gpa, file: 0 };
        MemoryMap::new(vec![region(0, 0x4000), region(0x10_0000, 0x10_0000)]).unwrap()
    }

    fn scope(spans: &[(u64, u64)]) -> Scope {
        let spans = spans.iter().map(|(gpa, len)| Span { gpa: *gpa, len: *len }).collect();
        Scope { rights: Rights::ReadOnly, spans: Some(spans) }
    }

    #[test]
    fn a_scope_cuts_the_memory_map() {
        let scope = scope(&[(0x1000, 0x1000), (0x3000, 0x10_0000), (0x18_0000, 0x100_0000)]);
        scope.check(&map()).unwrap();
        let region = |gpa, len| Region { gpa, len, offset: gpa, file: 0 };
        let expected = [
            region(0x1000, 0x1000),
            region(0x3000, 0x1000),
            region(0x10_0000, 0x3000),
            region(0x18_0000, 0x8_0000),
        ];
        assert_eq!(scope.regions(&map()), expected);
        assert!(!scope.contains(0xfff) && scope.contains(0x1000) && scope.contains(0x1fff));
        assert!(!scope.contains(0x2000) && scope.contains(0x4000) && !scope.contains(u64::MAX));
        assert_eq!(Scope::whole(Rights::ReadWrite).regions(&map()), map().regions());
        assert!(Scope::whole(Rights::ReadWrite).contains(u64::MAX));
    }

    #[test]
    fn rights_are_narrowed_and_never_widened() {
        let rights = |has, asked| Scope::whole(has).at_most(asked).rights;
        assert_eq!(rights(Rights::ReadWrite, Rights::ReadOnly), Rights::ReadOnly);
        assert_eq!(rights(Rights::ReadOnly, Rights::ReadWrite), Rights::ReadOnly);
        assert_eq!(rights(Rights::ReadWrite, Rights::ReadWrite), Rights::ReadWrite);
    }

    #[test]
    fn what_is_to_be_reached_is_checked_against_scope_and_memory() {
        let span = |gpa, len| Span { gpa, len };
        let scope = scope(&[(0x1000, 0x1000), (0x10_0000, 0x1000)]);
        let reaches =
            |spans: &[Span]| scope.check_reaches(spans, &map()).map_err(|error| error.to_string());
        assert_eq!(reaches(&[]), Ok(()));
        assert_eq!(reaches(&[span(0x8000, 0x10_0000), span(0, u64::MAX), span(0x1fff, 1)]), Ok(()));
        let refused = |gpa, len, range: &str| {
            let words = "holds no memory that the token opens, which is at 0x1000..0x2000, 0x100000..0x101000";
            let error = format!("range {range} {words}; the token was not used");
            assert_eq!(reaches(&[span(0x1000, 1), span(gpa, len)]), Err(error));
        };
        refused(0, 0x1000, "0x0..0x1000");
        refused(0x2000, 0x1000, "0x2000..0x3000");
        refused(0x1000, 0, "0x1000..0x1000");
        refused(0x1000, u64::MAX, "0x1000 (length 0xffffffffffffffff)");
        let most = vec![span(0x1000, 1); MAX_SPANS];
        assert_eq!(reaches(&most), Ok(()));
        assert!(reaches(&[&most[..], &most[..1]].concat()).unwrap_err().contains("65 ranges"));
        let elsewhere = Scope { spans: Some(vec![span(0x8000, 0x1000)]), ..scope };
        let error = elsewhere.check_reaches(&most, &map()).unwrap_err().to_string();
        assert!(error.contains("which is nowhere"), "{error}");
    }

    #[test]
    fn bad_spans_are_refused_by_name() {
        let many: Vec<(u64, u64)> = (0..65).map(|n| (n * 0x2000, 0x1000)).collect();
        let cases: Vec<(Scope, &str)> = vec![
            (scope(&[]), "no range"),
            (scope(&many), "65 ranges"),
            (scope(&[(0, 0)]), "0x0..0x0 is empty"),
            (scope(&[(1, 0x1000)]), "0x1..0x1001 is empty or not page-aligned"),
            (scope(&[(0x1000, 0xfff)]), "multiples of 0x1000"),
            (scope(&[(!0xfff, 0x1000)]), "0xfffffffffffff000 (length 0x1000) ends out of range"),
            (scope(&[(0x1000, !0xfff)]), "ends out of range"),
            (scope(&[(0, 0x2000), (0x1000, 0x1000)]), "0x1000..0x2000 overlaps"),
            (scope(&[(0x1000, 0x1000), (0, 0x1000)]), "ascending"),
            (
                scope(&[(0x4000, 0x1000)]),
                "0x4000..0x5000 holds none of the target's RAM, which is at 0x0..0x4000, 0x100000..0x200000",
            ),
        ];
        for (scope, words) in cases {
            let error = scope.check(&map()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let regions = (0..64)
            .map(|n| Region { gpa: n << 13, len: 0x1000, offset: n << 13, file: 0 })
            .collect();
        let holes = MemoryMap::new(regions).unwrap();
        let halves: Vec<(u64, u64)> = vec![(0, 0x1000), (0x2000, 64 << 13)];
        assert_eq!(scope(&halves).check(&holes), Ok(()));
        let large =
            MemoryMap::new(vec![Region { gpa: 0, len: 64 << 13, offset: 0, file: 0 }]).unwrap();
        let pages: Vec<(u64, u64)> = (0..64).map(|n| (n << 13, 0x1000)).collect();
        assert_eq!(scope(&pages).check(&large), Ok(()));
    }

    proptest! {
        #[test]
        fn each_page_is_in_the_regions_if_it_is_ram_and_in_the_scope(
            spans in proptest::collection::vec((0u64..0x20, 1u64..0x20), 0..6),
            pages in proptest::collection::vec((0u64..8, 1u64..8), 1..6),
        ) {
            let ascending = |list: &[(u64, u64)]| {
                let mut at = 0;
                let place = |(gap, len): &(u64, u64)| {
                    let gpa = at + gap;
                    at = gpa + len;
                    (gpa << 12, len << 12)
                };
                list.iter().map(place).collect::<Vec<_>>()
            };
            let scope = scope(&ascending(&spans));
            let regions = ascending(&pages).into_iter().map(|(gpa, len)| Region { gpa, len, offset: gpa + 0x1000, file: 1 });
            let map = MemoryMap::new(regions.collect()).unwrap();
            let cut = scope.regions(&map);
            prop_assert!(cut.iter().zip(cut.iter().skip(1)).all(|(a, b)| a.gpa + a.len <= b.gpa));
            for page in (0..0x200u64).map(|gfn| gfn << 12) {
                let found = cut.iter().find(|r| (r.gpa..r.gpa + r.len).contains(&page));
                let expected = map.resolve(page).filter(|_| scope.contains(page));
                prop_assert_eq!(found.map(|r| (r.file, r.offset + (page - r.gpa))), expected);
            }
        }

        #[test]
        fn any_numbers_are_checked_without_harm(numbers in proptest::collection::vec(any::<(u64, u64)>(), 0..4), gpa: u64) {
            let scope = scope(&numbers);
            let _ = scope.check(&map());
            let _ = scope.contains(gpa);
            let _ = scope.regions(&map());
            let _ = scope.check_reaches(scope.spans.as_deref().unwrap_or_default(), &map());
        }
    }
}

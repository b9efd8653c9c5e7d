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
mod tests;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ranges of guest-physical addresses, as `--range A..B` gives them.

use std::ops::Range;

use anyhow::{Result, bail};
use kvmmem::PAGE_SIZE;
use serde::Serialize;

use crate::failure::usage;
use crate::number::{Hex, parse};

/// From the first address up to the end, which is not part of it. Both are multiples of the page
/// size.
pub(crate) type GpaRange = Range<u64>;

/// The end of guest-physical memory: x86-64 has at most 52 address bits. A range without an end,
/// `1M..`, ends here.
pub(crate) const GPA_END: u64 = 1 << 52;

const PAGE: u64 = PAGE_SIZE as u64;

/// The pages of `len` bytes from an address on, which do not pass the end of the address space.
pub(crate) fn pages(gpa: u64, len: u64) -> GpaRange {
    let end = gpa.saturating_add(len);
    gpa / PAGE * PAGE..end.checked_next_multiple_of(PAGE).unwrap_or(end)
}

/// Reads `START..END`, for example `0x100000..0x200000` or `1M..2M`. Without START it begins at 0,
/// without END it is all that follows.
pub(crate) fn parse_range(text: &str) -> Result<GpaRange, String> {
    let (start, end) = text.split_once("..").ok_or(
        "write a range as START..END, for example 1M..2M, 1M.. or ..2M; END is not part of it",
    )?;
    let bound = |text: &str, open| if text.is_empty() { Ok(open) } else { parse(text) };
    let (start, end) = (bound(start, 0)?, bound(end, GPA_END)?);
    if start >= end {
        return Err(format!(
            "{start:#x}..{end:#x} is empty: END is not part of the range, so it must be above START"
        ));
    }
    if end > GPA_END {
        return Err(format!(
            "{end:#x} is beyond the guest-physical addresses, which end at {GPA_END:#x}"
        ));
    }
    if !start.is_multiple_of(PAGE) || !end.is_multiple_of(PAGE) {
        let (start, end) = (start / PAGE * PAGE, end.next_multiple_of(PAGE));
        return Err(format!(
            "START and END must be multiples of {PAGE:#x}: {start:#x}..{end:#x} holds it"
        ));
    }
    Ok(start..end)
}

/// The ranges by ascending address; an error if two share addresses.
pub(crate) fn in_order(ranges: &[GpaRange]) -> Result<Vec<GpaRange>> {
    let mut ranges = ranges.to_vec();
    ranges.sort_unstable_by_key(|range| range.start);
    for (before, after) in ranges.iter().zip(ranges.iter().skip(1)) {
        if before.end > after.start {
            return Err(usage(format!(
                "the ranges {before:#x?} and {after:#x?} overlap: give each address once"
            )));
        }
    }
    Ok(ranges)
}

/// What of `wanted` (all, if it is empty) lies within `reached`. Both ascend.
pub(crate) fn select(wanted: &[GpaRange], reached: &[GpaRange]) -> Result<Vec<GpaRange>> {
    if wanted.is_empty() {
        return Ok(reached.to_vec());
    }
    let mut selected = Vec::new();
    for range in wanted {
        let before = selected.len();
        let common = |part: &GpaRange| part.start.max(range.start)..part.end.min(range.end);
        selected.extend(reached.iter().map(common).filter(|part| !part.is_empty()));
        if selected.len() == before {
            let reached: Vec<String> = reached.iter().map(|part| format!("{part:#x?}")).collect();
            bail!("the view does not reach into {range:#x?}; it reaches {}", reached.join(", "));
        }
    }
    Ok(selected)
}

/// A range, as JSON.
#[derive(Serialize)]
pub(crate) struct RangeLine {
    pub(crate) gpa: Hex,
    pub(crate) len: u64,
}

impl RangeLine {
    pub(crate) fn new(gpa: u64, len: u64) -> Self {
        Self { gpa: Hex(gpa), len }
    }
}

/// What lies between the ranges, which ascend, from address 0 on.
pub(crate) fn gaps(ranges: &[GpaRange]) -> Vec<GpaRange> {
    let end = ranges.last().map_or(0, |range| range.end);
    if end == 0 { Vec::new() } else { missing(std::slice::from_ref(&(0..end)), ranges) }
}

/// What of `wanted` is not in `there`. Both ascend.
pub(crate) fn missing(wanted: &[GpaRange], there: &[GpaRange]) -> Vec<GpaRange> {
    let mut missing = Vec::new();
    for range in wanted {
        let mut at = range.start;
        for part in there.iter().filter(|part| part.end > range.start && part.start < range.end) {
            missing.push(at..part.start.max(at));
            at = part.end;
        }
        missing.push(at..range.end.max(at));
    }
    missing.retain(|range| !range.is_empty());
    missing
}

/// What of `wanted` is not in `all`, both ascending, after a warning that names it. A range without
/// END is all that follows, so that nothing of it is missing.
pub(crate) fn left_out(wanted: &[GpaRange], all: &[GpaRange]) -> Vec<GpaRange> {
    let closed: Vec<_> = wanted.iter().filter(|range| range.end != GPA_END).cloned().collect();
    let left_out = missing(&closed, all);
    if !left_out.is_empty() {
        let shown = shown(&left_out);
        tracing::warn!(
            "the view does not reach all of --range: {shown} is left out (no RAM is there, or it is not granted)"
        );
    }
    left_out
}

/// The ranges in words, of many the first ones.
pub(crate) fn shown(ranges: &[GpaRange]) -> String {
    const MOST: usize = 8;
    let first: Vec<String> = ranges.iter().take(MOST).map(|range| format!("{range:#x?}")).collect();
    let more = ranges.len().saturating_sub(MOST);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    first.join(", ") + &rest
}

/// Bytes of all the ranges together.
pub(crate) fn total(ranges: &[GpaRange]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        assert_eq!(parse_range("0x100000..0x200000"), Ok(0x10_0000..0x20_0000));
        assert_eq!(parse_range("1M..2M"), Ok(0x10_0000..0x20_0000));
        assert_eq!(parse_range("0..4096T"), Ok(0..GPA_END));
        assert_eq!(parse_range("..1MiB"), Ok(0..0x10_0000));
        assert_eq!(parse_range("1M.."), Ok(0x10_0000..GPA_END));
        assert_eq!(parse_range(".."), Ok(0..GPA_END));
        let cases = [
            ("1M", "START..END"),
            ("2M..1M", "empty"),
            ("1M..1M", "empty"),
            ("0x1001..0x2fff", "0x1000..0x3000"),
            ("0..8192T", "end at"),
            ("1M..=2M", "4096"),
            ("-1..2", "sign"),
            ("18446744073709551615..2", "empty"),
        ];
        for (text, word) in cases {
            let error = parse_range(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn ranges_that_overlap_are_named() {
        assert_eq!(in_order(&[0x2000..0x3000, 0..0x2000]).unwrap(), [0..0x2000, 0x2000..0x3000]);
        let error = in_order(&[0x2000..0x3000, 0..0x2001]).unwrap_err().to_string();
        assert_eq!(
            error,
            "the ranges 0x0..0x2001 and 0x2000..0x3000 overlap: give each address once"
        );
    }

    #[test]
    fn what_is_missing_is_told() {
        assert_eq!(
            gaps(&[0..0xa0, 0x100..0x200, 0x200..0x300, 0x500..0x600]),
            [0xa0..0x100, 0x300..0x500]
        );
        assert_eq!(gaps(&[0x10..0x20, 0x30..0x40]), [0..0x10, 0x20..0x30]);
        assert_eq!(gaps(&[]), []);
        let there = [0x1000..0x3000, 0x4000..0x5000];
        let rest = [0..0x1000, 0x3000..0x4000, 0x5000..0x9000];
        assert_eq!(missing(std::slice::from_ref(&(0..0x9000)), &there), rest);
        assert_eq!(
            missing(&[0x2000..0x4800, 0x6000..0x7000], &there),
            [0x3000..0x4000, 0x6000..0x7000]
        );
        assert_eq!(missing(&there, &there), []);
    }

    #[test]
    fn holes_of_an_open_range_are_not_left_out() {
        let there = [0x1000..0x3000, 0x4000..0x5000];
        let left = left_out(&[0x2000..0x4800, 0x4800..GPA_END], &there);
        assert_eq!(left, std::slice::from_ref(&(0x3000..0x4000)));
        assert_eq!(left_out(std::slice::from_ref(&(0..GPA_END)), &there), []);
    }

    #[test]
    fn what_is_not_reached_is_left_out_or_refused() {
        let reached = [0x1000..0x3000, 0x4000..0x5000];
        assert_eq!(select(&[], &reached).unwrap(), reached);
        assert_eq!(select(std::slice::from_ref(&(0..0x9000)), &reached).unwrap(), reached);
        assert_eq!(
            select(&[0x2000..0x4000, 0x4000..0x5000], &reached).unwrap(),
            [0x2000..0x3000, 0x4000..0x5000]
        );
        let error = select(&[0x2000..0x4000, 0x5000..0x6000], &reached).unwrap_err().to_string();
        assert!(
            error.contains("0x5000..0x6000") && error.contains("0x1000..0x3000, 0x4000..0x5000"),
            "{error}"
        );
    }
}

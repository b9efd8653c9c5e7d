// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads that pass over pages that cannot be read.

use kvmmem::PAGE_SIZE;
use kvmmem::view::{View, ViewError};

use crate::range::GpaRange;

/// Fills the buffer; pages that cannot be read are zeros.
pub(super) fn read(view: &View, gpa: u64, buffer: &mut [u8]) -> Result<Vec<GpaRange>, ViewError> {
    match view.read_at(gpa, buffer) {
        Ok(()) => return Ok(Vec::new()),
        Err(error) if error.is_unreadable() => {}
        Err(error) => return Err(error),
    }
    let mut unreadable: Vec<GpaRange> = Vec::new();
    for (page, at) in buffer.chunks_mut(PAGE_SIZE).zip((gpa..).step_by(PAGE_SIZE)) {
        match view.read_at(at, page) {
            Ok(()) => {}
            Err(error) if error.is_unreadable() => {
                page.fill(0);
                add(&mut unreadable, at..at + page.len() as u64);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(unreadable)
}

/// Adds a range behind those that there are.
pub(super) fn add(ranges: &mut Vec<GpaRange>, range: GpaRange) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_follow_each_other_are_one() {
        let mut ranges = Vec::new();
        [0..1, 1..2, 4..5].into_iter().for_each(|range| add(&mut ranges, range));
        assert_eq!(ranges, [0..2, 4..5]);
    }
}

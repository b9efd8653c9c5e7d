// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A stretch of memory in a dump file.

use crate::range::Range;

/// The most stretches that a file may have.
pub(super) const MAX_SEGMENTS: usize = 1 << 16;

/// A stretch of memory in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The guest-physical addresses.
    pub range: Range,
    /// Where the first byte lies in the file.
    pub offset: u64,
}

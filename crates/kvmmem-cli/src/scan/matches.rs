// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a search finds: matches, and the bytes around them that are shown.

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::Arc;

/// The most bytes that can be shown before and after a match.
pub(super) const MAX_AROUND: u64 = 4096;

/// Bytes that are shown around a match.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Around {
    pub(super) before: u64,
    pub(super) after: u64,
}

/// A match.
#[derive(Clone, Debug)]
pub(super) struct Match {
    /// Where it begins.
    pub(super) gpa: u64,
    pub(super) len: usize,
    /// Which of the patterns.
    pub(super) pattern: usize,
    pub(super) copy: Arc<[u8]>,
    /// Where it begins in the copy.
    pub(super) at: usize,
    /// What is shown, in the copy.
    pub(super) shown: Range<usize>,
}

impl Match {
    /// What is shown before it.
    pub(super) fn before(&self) -> &[u8] {
        self.copy.get(self.shown.start..self.at).unwrap_or_default()
    }

    /// What is shown from its beginning on.
    pub(super) fn bytes(&self) -> &[u8] {
        self.copy.get(self.at..self.shown.end).unwrap_or_default()
    }

    pub(super) fn order(&self, other: &Self) -> Ordering {
        (self.gpa, self.pattern).cmp(&(other.gpa, other.pattern))
    }
}

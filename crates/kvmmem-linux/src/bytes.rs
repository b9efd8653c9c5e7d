// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers and strings in a copy of one of the kernel's structures. What passes the copy's end reads as zero.

use std::ops::Range;

/// A copy of a structure, or of its first part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bytes(Vec<u8>);

impl Bytes {
    /// `len` zeros.
    pub(crate) fn zeroed(len: u64) -> Self {
        Self(vec![0; usize::try_from(len).unwrap_or(0)])
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len() as u64
    }

    pub(crate) fn as_ref(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// Whether nothing was written here.
    pub(crate) fn is_zero(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }

    /// A part, if all of it is there.
    pub(crate) fn part(&self, at: u64, len: u64) -> Option<Self> {
        let part = self.get(at, len);
        (part.len() as u64 == len).then(|| Self(part.to_vec()))
    }

    fn get(&self, at: u64, len: u64) -> &[u8] {
        let range = || {
            let at = usize::try_from(at).ok()?;
            Some(Range { start: at, end: at.checked_add(usize::try_from(len).ok()?)? })
        };
        range().and_then(|range| self.0.get(range)).unwrap_or_default()
    }

    /// A number of `len` bytes.
    fn word(&self, at: u64, len: u64) -> u64 {
        self.get(at, len).iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
    }

    pub(crate) fn u64(&self, at: u64) -> u64 {
        self.word(at, 8)
    }

    pub(crate) fn u32(&self, at: u64) -> u32 {
        u32::try_from(self.word(at, 4)).unwrap_or(0)
    }

    pub(crate) fn u16(&self, at: u64) -> u16 {
        u16::try_from(self.word(at, 2)).unwrap_or(0)
    }

    pub(crate) fn u8(&self, at: u64) -> u8 {
        u8::try_from(self.word(at, 1)).unwrap_or(0)
    }

    /// A string of at most `len` bytes; what is not UTF-8 is replaced.
    pub(crate) fn string(&self, at: u64, len: u64) -> String {
        text(self.get(at, len))
    }
}

/// The bytes before the first zero as text; what is not UTF-8 is replaced.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

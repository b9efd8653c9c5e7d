// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers and strings in a copy of one of the kernel's structures. What passes the copy's end, or
//! could not be read, reads as zero.

use std::ops::Range;

use kvmmem_memory::PAGE_SIZE;

use crate::kernel::error::KernelError;
use crate::kernel::guest_kernel::Kernel;

/// A copy of a structure, or of its first part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bytes {
    bytes: Vec<u8>,
    /// The parts that could not be read.
    missing: Vec<Range<u64>>,
}

impl Bytes {
    /// `len` zeros.
    pub(crate) fn zeroed(len: u64) -> Self {
        Self { bytes: vec![0; usize::try_from(len).unwrap_or(0)], missing: Vec::new() }
    }

    /// The `len` bytes at `gva`, as far as they can be read.
    ///
    /// # Errors
    /// [`KernelError::Read`]: none of their pages can.
    pub(crate) fn read(kernel: &Kernel<'_>, gva: u64, len: u64) -> Result<Self, KernelError> {
        let mut copy = Self::zeroed(len);
        let Err(error) = kernel.read(gva, copy.as_mut()) else { return Ok(copy) };
        if !error.is_local() {
            return Err(error);
        }
        let mut at = 0;
        while at < copy.len() {
            let start = gva.wrapping_add(at);
            let end = (at + PAGE_SIZE as u64 - start % PAGE_SIZE as u64).min(copy.len());
            let range = Range {
                start: usize::try_from(at).unwrap_or(0),
                end: usize::try_from(end).unwrap_or(0),
            };
            let part = copy.bytes.get_mut(range).unwrap_or_default();
            if kernel.read(start, part).is_err() {
                part.fill(0);
                copy.missing.push(at..end);
            }
            at = end;
        }
        let missing: u64 = copy.missing.iter().map(|part| part.end - part.start).sum();
        if missing < copy.len() { Ok(copy) } else { Err(error) }
    }

    /// Whether all of a part could be read.
    pub(crate) fn has(&self, at: u64, len: u64) -> bool {
        self.missing.iter().all(|part| part.end <= at || at.saturating_add(len) <= part.start)
    }

    /// Whether all of it could be read.
    pub(crate) fn is_whole(&self) -> bool {
        self.missing.is_empty()
    }

    pub(crate) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub(crate) fn as_ref(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Whether nothing was written here.
    pub(crate) fn is_zero(&self) -> bool {
        self.bytes.iter().all(|byte| *byte == 0)
    }

    /// A part, if all of it is there.
    pub(crate) fn part(&self, at: u64, len: u64) -> Option<Self> {
        let part = self.get(at, len);
        (part.len() as u64 == len).then(|| Self { bytes: part.to_vec(), missing: Vec::new() })
    }

    fn get(&self, at: u64, len: u64) -> &[u8] {
        let range = || {
            let at = usize::try_from(at).ok()?;
            Some(Range { start: at, end: at.checked_add(usize::try_from(len).ok()?)? })
        };
        range().and_then(|range| self.bytes.get(range)).unwrap_or_default()
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

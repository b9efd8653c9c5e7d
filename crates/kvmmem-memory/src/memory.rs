// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Trait [`Memory`]: reads of guest-physical memory.

use crate::error::{MemoryError, VectoredError};
use crate::range::{Range, next_range};

/// Guest-physical memory of one virtual machine, running or not. Many threads may read at once.
///
/// A running target changes its memory between two reads, and during one: only what one call
/// returns can belong together, and even that need not.
pub trait Memory: Sync {
    /// Fills `buf` from guest-physical address `gpa` on.
    ///
    /// # Errors
    /// [`MemoryError`]. Some of `buf` may have been filled then.
    fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// Fills each piece's bytes from its guest-physical address on, in order. Pieces may have any
    /// length and may overlap in the target.
    ///
    /// # Errors
    /// [`VectoredError`] with the first piece that could not be filled.
    fn read_vectored(&self, pieces: &mut [(u64, &mut [u8])]) -> Result<(), VectoredError> {
        for (piece, (gpa, bytes)) in pieces.iter_mut().enumerate() {
            self.read_at(*gpa, bytes).map_err(|source| VectoredError { piece, source })?;
        }
        Ok(())
    }

    /// The memory that can be read: disjoint, ascending.
    ///
    /// # Errors
    /// [`MemoryError::Ended`].
    fn ranges(&self) -> Result<Vec<Range>, MemoryError>;

    /// The next stretch of memory at or after `gpa` that holds data, `None` where there is no more.
    /// What lies between reads as zeros or not at all. Where that is not known, all memory
    /// counts as data.
    ///
    /// # Errors
    /// [`MemoryError::Ended`].
    fn data_from(&self, gpa: u64) -> Result<Option<Range>, MemoryError> {
        Ok(next_range(&self.ranges()?, gpa))
    }
}

impl dyn Memory + '_ {
    /// The parts of the memory that hold data, ascending; the iterator ends after an error.
    pub fn data(&self) -> impl Iterator<Item = Result<Range, MemoryError>> {
        let mut next = Some(0);
        std::iter::from_fn(move || {
            let at = next.take()?;
            let part = match self.data_from(at) {
                Ok(part) => part?,
                Err(error) => return Some(Err(error)),
            };
            // A backend that goes back would be asked for ever.
            next = Some(part.end()).filter(|end| *end > at && *end < u64::MAX);
            Some(Ok(part))
        })
    }
}

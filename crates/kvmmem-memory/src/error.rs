// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why guest-physical memory could not be read.

use std::error::Error;

/// What went wrong below.
type Source = Box<dyn Error + Send + Sync>;

/// A read failed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The target has no RAM there, or this view or file does not reach it.
    #[error("there is no memory at gpa {gpa:#x}")]
    Hole {
        /// The first such address.
        gpa: u64,
    },
    /// These bytes cannot be read; others may be.
    #[error("cannot read gpa {gpa:#x}")]
    Unreadable {
        /// First address of what was to be read.
        gpa: u64,
        /// Why.
        #[source]
        source: Source,
    },
    /// Nothing can be read any more: the view was closed, the target has exited, the file is
    /// damaged.
    #[error("the memory can no longer be read")]
    Ended(#[source] Source),
}

impl MemoryError {
    /// Whether other addresses can still be read.
    pub fn is_local(&self) -> bool {
        !matches!(self, Self::Ended(_))
    }
}

/// A vectored read ended early. All pieces before [`VectoredError::piece`] are filled; of the
/// others any may be.
#[derive(Debug, thiserror::Error)]
#[error("piece {piece} was not read")]
pub struct VectoredError {
    /// Index of the first piece that was not filled.
    pub piece: usize,
    /// Why.
    #[source]
    pub source: MemoryError,
}

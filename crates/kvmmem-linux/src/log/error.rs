// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors of the log.

use crate::kernel::KernelError;

/// The most damaged records that are passed over.
pub(super) const MAX_DAMAGED: u64 = 1 << 16;

/// Why the log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The note lacks a line, or the line holds nothing that makes sense.
    #[error(
        "the kernel's note has no {0} that makes sense: its log is not that of Linux 5.10 or later"
    )]
    Note(&'static str),
    /// Very many records do not fit what leads to them.
    #[error("more than {MAX_DAMAGED} records of the log are damaged")]
    Damaged,
    /// What describes the ring buffer makes no sense, or memory of it cannot be read.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl LogError {
    /// Whether other records can be read.
    pub(super) fn is_local(&self) -> bool {
        match self {
            Self::Damaged => true,
            Self::Kernel(error) => matches!(error, KernelError::Read { .. }) && !error.is_final(),
            Self::Note(_) => false,
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why mapped memory was not accessed.

use rustix::io::Errno;

/// Why mapped memory was not accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    /// The access leaves the mapping.
    #[error("access at offset {offset:#x}, length {len:#x}, leaves the mapping of {size:#x} bytes")]
    Outside {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: usize,
        /// The mapping's length in bytes.
        size: u64,
    },
    /// A word's offset is not a multiple of its size.
    #[error("offset {offset:#x} is not a multiple of {size}")]
    Unaligned {
        /// Offset in bytes.
        offset: u64,
        /// The word's size in bytes.
        size: usize,
    },
    /// The view may not write.
    #[error(
        "the view is read-only; writing takes a grant that was made with --rw, and a view that is not opened read-only (Access::Granted)"
    )]
    ReadOnly,
    /// The memory was removed; [`crate::View::status`] tells why.
    #[error(
        "gpa {gpa:#x} is not mapped any more: the view has ended or the target's memory map has changed"
    )]
    Lost {
        /// The first address that was not copied.
        gpa: u64,
    },
    /// The handlers of SIGBUS and SIGILL, which catch accesses to removed memory, cannot be
    /// installed.
    #[error("cannot handle SIGBUS and SIGILL")]
    Guard(#[source] Errno),
}

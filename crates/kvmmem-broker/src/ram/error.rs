// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why memory cannot be a VM's RAM, and why it was not read or written.

use kvmmem_proto::map::MapError;
use kvmmem_proto::message::Refusal;
use rustix::io::Errno;

use crate::core::refused::{Refused, in_words};

/// Why file descriptors cannot be a VM's RAM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RamError {
    /// The memory map breaks a rule.
    #[error(transparent)]
    Map(#[from] MapError),
    /// There are fewer or more file descriptors than the regions name.
    #[error("RAM came as {found} files, its regions name {needed}")]
    Count {
        /// How many came.
        found: usize,
        /// How many there must be.
        needed: usize,
    },
    /// A file descriptor is not a memfd.
    #[error("RAM's file descriptor is not a memfd that can be sealed")]
    NotMemfd(#[source] Errno),
    /// A memfd may shrink under those who map it.
    #[error("RAM's memfd lacks F_SEAL_SHRINK")]
    Unsealed,
    /// A memfd is sealed against writing, or was opened read-only.
    #[error("RAM's memfd cannot be written")]
    ReadOnly,
    /// A memfd ends before the last of its regions does.
    #[error("RAM's memfd has {size:#x} bytes, its regions need {needed:#x}")]
    Small {
        /// Its size.
        size: u64,
        /// Where the last region ends.
        needed: u64,
    },
    /// A file descriptor is not `/proc/PID/mem`, open for reading and writing.
    #[error("the VMM's memory is no /proc/PID/mem that is open for reading and writing")]
    NotMemory,
    /// The VMM has no memory where a region should be.
    #[error("the VMM has no memory at {hva:#x}, where the RAM at gpa {gpa:#x} should be")]
    Unmapped {
        /// The region's guest-physical address.
        gpa: u64,
        /// The address in the VMM's process.
        hva: u64,
    },
    /// A file's size or mode cannot be read.
    #[error("cannot examine RAM's file")]
    Examine(#[source] Errno),
}

/// Why guest-physical memory was not read or written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AccessError {
    /// No RAM is there.
    #[error("gpa {0:#x} is not backed by RAM")]
    Hole(u64),
    /// The system refused: `ESRCH` where the RAM is private and the VMM has ended, `EIO` where it
    /// has unmapped it.
    #[error("cannot access the RAM at gpa {gpa:#x}")]
    System {
        /// The address.
        gpa: u64,
        /// Why.
        #[source]
        source: Errno,
    },
}

impl From<RamError> for Refused {
    fn from(error: RamError) -> Self {
        Self::new(Refusal::Invalid, format!("RAM is not acceptable: {}", in_words(&error)))
    }
}

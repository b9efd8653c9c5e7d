// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why memory cannot be a VM's RAM, and why it was not read or written.

use kvmmem_proto::map::MapError;
use kvmmem_proto::message::Refusal;
use rustix::io::Errno;

use crate::core::call_error::{CallError, in_words};

/// Why file descriptors cannot be a VM's RAM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RamError {
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("RAM came as {found} files, its regions name {needed}")]
    Count { found: usize, needed: usize },
    #[error("RAM's file descriptor is not a memfd that can be sealed")]
    NotMemfd(#[source] Errno),
    #[error("RAM's memfd lacks F_SEAL_SHRINK")]
    Unsealed,
    #[error("RAM's memfd cannot be written")]
    ReadOnly,
    #[error("RAM's memfd has {size:#x} bytes, its regions need {needed:#x}")]
    Small { size: u64, needed: u64 },
    #[error("the VMM's memory is not a /proc/PID/mem that is open for reading and writing")]
    NotMemory,
    #[error("the VMM has no memory at {hva:#x}, where the RAM at gpa {gpa:#x} should be")]
    Unmapped { gpa: u64, hva: u64 },
    #[error("cannot examine RAM's file")]
    Examine(#[source] Errno),
}

/// Why guest-physical memory was not read or written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AccessError {
    #[error("gpa {0:#x} is not backed by RAM")]
    Hole(u64),
    #[error("cannot access the RAM at gpa {gpa:#x}")]
    System {
        gpa: u64,
        #[source]
        source: Errno,
    },
}

impl From<RamError> for CallError {
    fn from(error: RamError) -> Self {
        Self::new(Refusal::Invalid, format!("RAM is not acceptable: {}", in_words(&error)))
    }
}

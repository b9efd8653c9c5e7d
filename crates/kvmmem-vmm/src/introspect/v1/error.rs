// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors of pages mapped by v1.

use kvmmem_abi::errno::KvmError;
use kvmmem_sys::ram::RamError;

/// Why a page could not be mapped or unmapped. The guest gets [`MapError::number`].
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The own GPA is not the start of a page of RAM.
    #[error("own GPA {gpa:#x} is not the start of a page of RAM")]
    OwnPage {
        /// The GPA asked for.
        gpa: u64,
    },
    /// The target GPA is not page-aligned.
    #[error("target GPA {gpa:#x} is not page-aligned")]
    TargetAlignment {
        /// The GPA asked for.
        gpa: u64,
    },
    /// The own page is mapped already, or about to be.
    #[error("own GPA {gpa:#x} is replaced already")]
    InUse {
        /// The own GPA.
        gpa: u64,
    },
    /// Nothing is mapped there.
    #[error("own GPA {gpa:#x} is not replaced")]
    NotMapped {
        /// The own GPA.
        gpa: u64,
    },
    /// One mapping more could exceed the kernel's limit on mappings of one process.
    #[error("{limit} pages are replaced already, the most that vm.max_map_count allows")]
    Limit {
        /// The limit.
        limit: usize,
    },
    /// The answer on the token has not come yet: the call is to be made again.
    #[error("the token is being redeemed")]
    Pending,
    /// The token does not open a target.
    #[error("the token was refused ({})", .0.number())]
    Token(KvmError),
    /// The grant is read-only, and a mapped page is always writable.
    #[error("grant {grant} is for reading alone, and pages are mapped for writing: attach a view")]
    ReadOnly {
        /// The grant.
        grant: u64,
    },
    /// The grant was revoked meanwhile.
    #[error("grant {grant} was revoked while its page was mapped")]
    Revoked {
        /// The grant.
        grant: u64,
    },
    /// The target has no RAM there, or the grant does not reach it.
    #[error("target GPA {gpa:#x} is in a hole of the target's memory, or not granted")]
    TargetHole {
        /// The GPA asked for.
        gpa: u64,
    },
    /// The target is this very machine.
    #[error("a machine cannot map its own memory")]
    OwnMemory,
    /// The host's kernel refused.
    #[error("the host could not replace the page")]
    Host(#[source] RamError),
}

impl MapError {
    /// The error as the guest gets it.
    pub fn number(&self) -> KvmError {
        match self {
            Self::OwnPage { .. } | Self::TargetAlignment { .. } | Self::OwnMemory => {
                KvmError::Inval
            }
            Self::InUse { .. } => KvmError::Busy,
            Self::NotMapped { .. } | Self::Revoked { .. } => KvmError::NoEnt,
            Self::ReadOnly { .. } => KvmError::Perm,
            Self::Limit { .. } => KvmError::NoMem,
            Self::Token(error) => *error,
            Self::TargetHole { .. } => KvmError::Fault,
            Self::Host(RamError::HugePages { .. }) => KvmError::OpNotSupp,
            Self::Pending | Self::Host(_) => KvmError::Again,
        }
    }
}

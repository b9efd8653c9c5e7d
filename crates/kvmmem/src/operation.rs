// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Commands as error messages name them.

use std::fmt;

/// A command with its arguments, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// GET_VERSION.
    GetVersion,
    /// GET_GUEST_INFO.
    GetGuestInfo,
    /// GET_MAX_GFN.
    GetMaxGfn,
    /// GET_MAP_TOKEN.
    GetMapToken,
    /// QUERY_PHYSICAL of the frame `gfn`.
    QueryPhysical {
        /// Guest frame number.
        gfn: u64,
    },
    /// READ_PHYSICAL of `len` bytes at `gpa`.
    Read {
        /// First guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: usize,
    },
    /// WRITE_PHYSICAL of `len` bytes at `gpa`.
    Write {
        /// First guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: usize,
    },
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GetVersion => f.write_str("GET_VERSION"),
            Self::GetGuestInfo => f.write_str("GET_GUEST_INFO"),
            Self::GetMaxGfn => f.write_str("GET_MAX_GFN"),
            Self::GetMapToken => f.write_str("GET_MAP_TOKEN"),
            Self::QueryPhysical { gfn } => write!(f, "QUERY_PHYSICAL of gfn {gfn:#x}"),
            Self::Read { gpa, len } => write!(f, "READ_PHYSICAL of {len:#x} bytes at gpa {gpa:#x}"),
            Self::Write { gpa, len } => {
                write!(f, "WRITE_PHYSICAL of {len:#x} bytes at gpa {gpa:#x}")
            }
        }
    }
}

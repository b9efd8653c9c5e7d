// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Replies, VM to tool: [`Header`], [`ErrorCode`], then what the command returns.
//!
//! A tool extends a shorter payload with zeroes and ignores what is surplus, as the protocol's
//! first client does; so does [`Fixed::decode`].

use kvmmem_abi::errno::KvmError;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::message::{ERROR_CODE_SIZE, ErrorCode, HEADER_SIZE, Header};
use crate::token::Token;

/// The protocol version, the same in every generation.
pub const VERSION: u32 = 1;

/// Bytes before a reply's data.
pub const PREFIX_SIZE: usize = HEADER_SIZE + ERROR_CODE_SIZE;

/// A reply whose length the command fixes.
pub trait Fixed: Sized + FromBytes + IntoBytes + Immutable + KnownLayout {
    /// Reads the reply from a payload of any length, after the error code.
    fn decode(data: &[u8]) -> Self {
        let mut reply = Self::new_zeroed();
        for (to, from) in reply.as_mut_bytes().iter_mut().zip(data) {
            *to = *from;
        }
        reply
    }
}

/// Reply of GET_VERSION: 16 bytes, as in v7; a v6 tool ignores the last 8.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct Version {
    /// [`VERSION`].
    pub version: U32,
    padding: U32,
    /// Whether sub-page protection is offered (it is not).
    pub spp: u8,
    /// Whether `VMFUNC` is offered (it is not).
    pub vmfunc: u8,
    /// Whether EPT pointer switching is offered (it is not).
    pub eptp: u8,
    /// Whether virtualisation exceptions are offered (they are not).
    pub ve: u8,
    padding2: [u8; 4],
}

impl Version {
    /// What this implementation answers.
    pub const OURS: Self = Self {
        version: U32::new(VERSION),
        padding: U32::ZERO,
        spp: 0,
        vmfunc: 0,
        eptp: 0,
        ve: 0,
        padding2: [0; 4],
    };
}

/// Reply of GET_GUEST_INFO, 16 bytes.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct GuestInfo {
    /// Number of vCPUs.
    pub vcpu_count: U32,
    padding: [U32; 3],
}

impl GuestInfo {
    /// The information of a VM with this many vCPUs.
    pub const fn new(vcpu_count: u32) -> Self {
        Self { vcpu_count: U32::new(vcpu_count), padding: [U32::ZERO; 3] }
    }
}

/// Reply of GET_MAX_GFN, 8 bytes. The kernel series returns the end of the last memory slot, and
/// its tools take the number times 4096 for the size of the address space.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct MaxGfn {
    /// The guest frame number after the last one that is backed by memory.
    pub gfn: U64,
}

/// Reply of QUERY_PHYSICAL, 16 bytes: what lies in one piece in guest-physical memory and in what
/// backs it.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct PhysicalSlot {
    /// First guest frame number.
    pub gfn: U64,
    /// Number of pages.
    pub pages: U64,
}

/// Reply of GET_MAP_TOKEN, 32 bytes.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct MapToken {
    bytes: [u8; Token::SIZE],
}

impl MapToken {
    /// The token in the reply.
    pub fn token(&self) -> Token {
        Token::from_bytes(&self.bytes)
    }
}

impl Drop for MapToken {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.bytes);
    }
}

impl Fixed for Version {}
impl Fixed for GuestInfo {}
impl Fixed for MaxGfn {}
impl Fixed for PhysicalSlot {}
impl Fixed for MapToken {}

/// Writes header and error code in front of a reply's `data_size` bytes; `None` where that is too
/// much for a message.
pub fn prefix(
    id: u16,
    seq: u32,
    outcome: Result<(), KvmError>,
    data_size: usize,
) -> Option<[u8; PREFIX_SIZE]> {
    let size = u16::try_from(ERROR_CODE_SIZE.checked_add(data_size)?).ok()?;
    let mut bytes = [0; PREFIX_SIZE];
    let (header, error) = bytes.split_first_chunk_mut::<HEADER_SIZE>()?;
    Header::new(id, size, seq).write_to(header).ok()?;
    ErrorCode::new(outcome).write_to(error).ok()?;
    Some(bytes)
}

/// A reply's payload as the tool reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// The command succeeded; this is its data.
    Done(&'a [u8]),
    /// The command failed with one of KVM's errors.
    Failed(KvmError),
}

/// Why a reply's payload cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// There is no room for the error code.
    #[error("reply of {0:#x} bytes is shorter than its error code")]
    Short(usize),
    /// The error code is not one of KVM's.
    #[error("reply's error code {0:#x} is unknown")]
    Code(i32),
}

/// Splits the payload of a reply into its error code and its data.
///
/// # Errors
/// Where the payload is too short or the code is not one of KVM's.
pub fn decode(payload: &[u8]) -> Result<Outcome<'_>, DecodeError> {
    let (code, data) =
        ErrorCode::read_from_prefix(payload).map_err(|_| DecodeError::Short(payload.len()))?;
    match code.err.get() {
        0 => Ok(Outcome::Done(data)),
        err => KvmError::from_result(err.into()).map(Outcome::Failed).ok_or(DecodeError::Code(err)),
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Framing: the header of every message, the error code of every reply, the vCPU header.

use kvmmem_abi::errno::KvmError;
use zerocopy::little_endian::{I32, U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The largest payload of a message, bytes: two pages less the header. A larger one breaks the
/// stream.
pub const MAX_PAYLOAD: usize = 2 * 4096 - HEADER_SIZE;

/// Size of [`Header`], bytes.
pub const HEADER_SIZE: usize = size_of::<Header>();

/// Size of [`ErrorCode`], bytes.
pub const ERROR_CODE_SIZE: usize = size_of::<ErrorCode>();

/// Starts every message, in both directions (`struct kvmi_msg_hdr`).
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct Header {
    /// Command number; a reply repeats its request's.
    pub id: U16,
    /// Bytes of payload after this header.
    pub size: U16,
    /// Sequence number, chosen by the sender; a reply repeats its request's.
    pub seq: U32,
}

impl Header {
    /// A header of a message with `size` bytes of payload.
    pub const fn new(id: u16, size: u16, seq: u32) -> Self {
        Self { id: U16::new(id), size: U16::new(size), seq: U32::new(seq) }
    }

    /// Reads a header from the start of `bytes`; `None` where they are too few.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        Self::read_from_prefix(bytes).ok().map(|(header, _)| header)
    }
}

/// Starts the payload of every reply (`struct kvmi_error_code`); nothing follows it where `err` is
/// not 0.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct ErrorCode {
    /// 0, or the negative of one of KVM's error numbers.
    pub err: I32,
    padding: U32,
}

impl ErrorCode {
    /// The code of a command's outcome.
    pub fn new(outcome: Result<(), KvmError>) -> Self {
        let err = match outcome {
            Ok(()) => 0,
            Err(error) => -error.number(),
        };
        Self { err: I32::new(err), padding: U32::ZERO }
    }
}

/// Starts the payload of every vCPU command (`struct kvmi_vcpu_hdr`).
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct VcpuHeader {
    /// Index of the vCPU.
    pub vcpu: U16,
    padding1: U16,
    padding2: U32,
}

impl VcpuHeader {
    /// Checks that a vCPU command's payload starts with a proper header naming one of `vcpu_count`
    /// vCPUs.
    ///
    /// # Errors
    /// [`KvmError::Inval`] where the payload is too short, the padding is not zero or there is no
    /// such vCPU.
    pub fn check(payload: &[u8], vcpu_count: u32) -> Result<Self, KvmError> {
        let (header, _) = Self::read_from_prefix(payload).map_err(|_| KvmError::Inval)?;
        let padded = header.padding1.get() != 0 || header.padding2.get() != 0;
        if padded || u32::from(header.vcpu.get()) >= vcpu_count {
            return Err(KvmError::Inval);
        }
        Ok(header)
    }
}

const _: () = {
    assert!(HEADER_SIZE == 8);
    assert!(ERROR_CODE_SIZE == 8);
    assert!(size_of::<VcpuHeader>() == 8);
    assert!(MAX_PAYLOAD == 8184);
};

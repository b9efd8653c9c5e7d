// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests, tool to VM.

use kvmmem_abi::errno::KvmError;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::command;
use crate::message::Header;

/// The most bytes that READ_PHYSICAL and WRITE_PHYSICAL move: a page, and never across its end.
pub const MAX_TRANSFER: u16 = 4096;

/// A request that this implementation offers, with its arguments checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// GET_VERSION.
    GetVersion,
    /// CHECK_COMMAND of a command number.
    CheckCommand(u16),
    /// CHECK_EVENT of an event number.
    CheckEvent(u16),
    /// GET_GUEST_INFO.
    GetGuestInfo,
    /// READ_PHYSICAL.
    ReadPhysical {
        /// First guest-physical address.
        gpa: u64,
        /// Bytes to read: 1 to 4096, within one page.
        size: u16,
    },
    /// WRITE_PHYSICAL.
    WritePhysical {
        /// First guest-physical address.
        gpa: u64,
        /// What to write there: 1 to 4096 bytes, within one page.
        data: &'a [u8],
    },
    /// GET_MAP_TOKEN.
    GetMapToken,
    /// CONTROL_CMD_RESPONSE.
    ControlCmdResponse {
        /// Whether replies are sent from now on.
        enable: bool,
        /// Whether that holds for this very request too.
        now: bool,
    },
    /// GET_MAX_GFN.
    GetMaxGfn,
    /// QUERY_PHYSICAL.
    QueryPhysical {
        /// Any frame of the range that is asked for.
        gfn: u64,
    },
}

/// Payload of CHECK_COMMAND and CHECK_EVENT.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Check {
    id: U16,
    padding1: U16,
    padding2: U32,
}

/// Payload of READ_PHYSICAL; WRITE_PHYSICAL's data follows it.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Physical {
    gpa: U64,
    size: U64,
}

/// Payload of QUERY_PHYSICAL.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Frame {
    gfn: U64,
}

/// Payload of CONTROL_CMD_RESPONSE.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Control {
    enable: u8,
    now: u8,
    padding1: U16,
    padding2: U32,
}

impl<'a> Request<'a> {
    /// The command number.
    pub const fn id(&self) -> u16 {
        match self {
            Self::GetVersion => command::GET_VERSION,
            Self::CheckCommand(_) => command::CHECK_COMMAND,
            Self::CheckEvent(_) => command::CHECK_EVENT,
            Self::GetGuestInfo => command::GET_GUEST_INFO,
            Self::ReadPhysical { .. } => command::READ_PHYSICAL,
            Self::WritePhysical { .. } => command::WRITE_PHYSICAL,
            Self::GetMapToken => command::GET_MAP_TOKEN,
            Self::ControlCmdResponse { .. } => command::CONTROL_CMD_RESPONSE,
            Self::GetMaxGfn => command::GET_MAX_GFN,
            Self::QueryPhysical { .. } => command::QUERY_PHYSICAL,
        }
    }

    /// Decodes the payload of command `id`.
    ///
    /// # Errors
    /// [`KvmError::OpNotSupp`] where the command is not offered; [`KvmError::Inval`] where the
    /// payload has another length than the command's, padding is not zero, or a transfer is
    /// empty, larger than a page or crosses one.
    pub fn decode(id: u16, payload: &'a [u8]) -> Result<Self, KvmError> {
        match id {
            command::GET_VERSION => empty(payload, Self::GetVersion),
            command::CHECK_COMMAND => Ok(Self::CheckCommand(check(payload)?)),
            command::CHECK_EVENT => Ok(Self::CheckEvent(check(payload)?)),
            command::GET_GUEST_INFO => empty(payload, Self::GetGuestInfo),
            command::READ_PHYSICAL => {
                let place = Physical::read_from_bytes(payload).map_err(|_| KvmError::Inval)?;
                let size = transfer_size(&place)?;
                Ok(Self::ReadPhysical { gpa: place.gpa.get(), size })
            }
            command::WRITE_PHYSICAL => {
                let (place, data) =
                    Physical::read_from_prefix(payload).map_err(|_| KvmError::Inval)?;
                if usize::from(transfer_size(&place)?) != data.len() {
                    return Err(KvmError::Inval);
                }
                Ok(Self::WritePhysical { gpa: place.gpa.get(), data })
            }
            command::GET_MAP_TOKEN => empty(payload, Self::GetMapToken),
            command::CONTROL_CMD_RESPONSE => {
                let control = Control::read_from_bytes(payload).map_err(|_| KvmError::Inval)?;
                if control.padding1.get() != 0 || control.padding2.get() != 0 {
                    return Err(KvmError::Inval);
                }
                Ok(Self::ControlCmdResponse { enable: control.enable != 0, now: control.now != 0 })
            }
            command::GET_MAX_GFN => empty(payload, Self::GetMaxGfn),
            command::QUERY_PHYSICAL => {
                let frame = Frame::read_from_bytes(payload).map_err(|_| KvmError::Inval)?;
                Ok(Self::QueryPhysical { gfn: frame.gfn.get() })
            }
            _ => Err(KvmError::OpNotSupp),
        }
    }

    /// Appends the whole message, header and payload, to `out`.
    ///
    /// # Errors
    /// [`KvmError::Inval`] where the arguments break the command's rules; `out` is then as it was.
    pub fn encode(&self, seq: u32, out: &mut Vec<u8>) -> Result<(), KvmError> {
        let start = out.len();
        out.extend_from_slice(Header::new(self.id(), 0, seq).as_bytes());
        match *self {
            Self::GetVersion | Self::GetGuestInfo | Self::GetMapToken | Self::GetMaxGfn => {}
            Self::CheckCommand(id) | Self::CheckEvent(id) => {
                let check = Check { id: U16::new(id), padding1: U16::ZERO, padding2: U32::ZERO };
                out.extend_from_slice(check.as_bytes());
            }
            Self::QueryPhysical { gfn } => {
                out.extend_from_slice(Frame { gfn: U64::new(gfn) }.as_bytes());
            }
            Self::ReadPhysical { gpa, size } => {
                out.extend_from_slice(Physical::new(gpa, u64::from(size)).as_bytes());
            }
            Self::WritePhysical { gpa, data } => {
                out.extend_from_slice(Physical::new(gpa, data.len() as u64).as_bytes());
                out.extend_from_slice(data);
            }
            Self::ControlCmdResponse { enable, now } => {
                let control = Control {
                    enable: enable.into(),
                    now: now.into(),
                    padding1: U16::ZERO,
                    padding2: U32::ZERO,
                };
                out.extend_from_slice(control.as_bytes());
            }
        }
        finish(out, start).inspect_err(|_| out.truncate(start))
    }
}

impl Physical {
    fn new(gpa: u64, size: u64) -> Self {
        Self { gpa: U64::new(gpa), size: U64::new(size) }
    }
}

/// Writes the size into the header at `start`, once the decoder agrees with what follows it.
fn finish(out: &mut [u8], start: usize) -> Result<(), KvmError> {
    let (header, payload) = out
        .get_mut(start..)
        .and_then(|message| Header::mut_from_prefix(message).ok())
        .ok_or(KvmError::Inval)?;
    header.size = u16::try_from(payload.len()).map_err(|_| KvmError::Inval)?.into();
    Request::decode(header.id.get(), payload).map(|_| ())
}

fn empty<'a>(payload: &[u8], request: Request<'a>) -> Result<Request<'a>, KvmError> {
    if payload.is_empty() { Ok(request) } else { Err(KvmError::Inval) }
}

fn check(payload: &[u8]) -> Result<u16, KvmError> {
    let check = Check::read_from_bytes(payload).map_err(|_| KvmError::Inval)?;
    if check.padding1.get() != 0 || check.padding2.get() != 0 {
        return Err(KvmError::Inval);
    }
    Ok(check.id.get())
}

fn transfer_size(place: &Physical) -> Result<u16, KvmError> {
    let (gpa, size) = (place.gpa.get(), place.size.get());
    let most = u64::from(MAX_TRANSFER);
    if size == 0 || size > most || gpa % most + size > most {
        return Err(KvmError::Inval);
    }
    u16::try_from(size).map_err(|_| KvmError::Inval)
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The handshake: the VMM's side introduces the VM in 96 bytes, the tool answers with 24.
//!
//! Each side's structure starts with its own size; a reader takes any size from its least to 64 KiB
//! and ignores what is surplus, so that either side may grow.

use std::io::{self, Read, Write};

use zerocopy::little_endian::{I64, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of what the VMM's side sends, bytes.
pub const VM_HELLO_SIZE: usize = size_of::<VmHelloWire>();

/// Size of what the tool sends, bytes.
pub const TOOL_HELLO_SIZE: usize = size_of::<ToolHelloWire>();

/// The longest name, bytes; the field's last byte is a NUL.
pub const MAX_NAME: usize = 63;

/// The least size of a VM's hello that names it at all: everything before the name.
const VM_HELLO_LEAST: usize = 32;

/// The largest structure that a reader takes, bytes.
const MOST: usize = 64 * 1024;

/// How the VMM's side introduces a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmHello {
    /// UUID of the VM, in the order in which it is printed.
    pub uuid: [u8; 16],
    /// When the VM was started, milliseconds since the epoch.
    pub start_time_ms: i64,
    /// Name of the VM; at most [`MAX_NAME`] bytes of it travel.
    pub name: String,
}

/// The tool's answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ToolHello {
    /// Hash of a shared cookie, zero where none is configured.
    pub cookie_hash: [u8; 20],
}

#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct VmHelloWire {
    size: U32,
    uuid: [u8; 16],
    padding: U32,
    start_time_ms: I64,
    name: [u8; 64],
}

#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct ToolHelloWire {
    size: U32,
    cookie_hash: [u8; 20],
}

impl VmHelloWire {
    const SIZE: U32 = U32::new(96);
}

impl ToolHelloWire {
    const SIZE: U32 = U32::new(24);
}

const _: () = {
    assert!(VmHelloWire::SIZE.get() as usize == VM_HELLO_SIZE);
    assert!(ToolHelloWire::SIZE.get() as usize == TOOL_HELLO_SIZE);
};

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The peer's structure is too small or too large.
    #[error("peer's handshake says it has {size:#x} bytes, expected {least:#x} to {most:#x}")]
    Size {
        /// The size in its header.
        size: usize,
        /// The least that is taken.
        least: usize,
        /// The most that is taken.
        most: usize,
    },
    /// The socket failed, or the peer took too long.
    #[error("handshake with the peer failed")]
    Io(#[from] io::Error),
}

impl VmHello {
    /// The bytes on the wire. A name that is too long is cut at a character's border.
    pub fn encode(&self) -> [u8; VM_HELLO_SIZE] {
        let mut wire = VmHelloWire {
            size: VmHelloWire::SIZE,
            uuid: self.uuid,
            padding: U32::ZERO,
            start_time_ms: I64::new(self.start_time_ms),
            name: [0; 64],
        };
        let name = self.name.get(..self.name.floor_char_boundary(MAX_NAME)).unwrap_or_default();
        for (to, from) in wire.name.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        zerocopy::transmute!(wire)
    }

    /// Reads the bytes after the size; missing ones count as zero.
    fn decode(bytes: &[u8]) -> Self {
        let wire: VmHelloWire = after_size(bytes);
        let name = wire.name.split(|byte| *byte == 0).next().unwrap_or_default();
        Self {
            uuid: wire.uuid,
            start_time_ms: wire.start_time_ms.get(),
            name: String::from_utf8_lossy(name).into_owned(),
        }
    }

    /// The tool's first step: reads a VM's introduction.
    ///
    /// # Errors
    /// Where the socket fails or the structure's size is not between 32 bytes and 64 KiB.
    pub fn receive(stream: &mut impl Read) -> Result<Self, HandshakeError> {
        Ok(Self::decode(&read_sized(stream, VM_HELLO_LEAST)?))
    }

    /// The VMM's first step: introduces the VM.
    ///
    /// # Errors
    /// Where the socket fails.
    pub fn send(&self, stream: &mut impl Write) -> Result<(), HandshakeError> {
        Ok(stream.write_all(&self.encode())?)
    }
}

impl ToolHello {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; TOOL_HELLO_SIZE] {
        zerocopy::transmute!(ToolHelloWire {
            size: ToolHelloWire::SIZE,
            cookie_hash: self.cookie_hash
        })
    }

    /// How many bytes an answer has that begins with this size, the size among them.
    ///
    /// # Errors
    /// Where it is not between 24 bytes and 64 KiB.
    pub fn size(bytes: [u8; 4]) -> Result<usize, HandshakeError> {
        checked_size(bytes, TOOL_HELLO_SIZE)
    }

    /// The VMM's second step: reads the tool's answer.
    ///
    /// # Errors
    /// Where the socket fails or the structure's size is not between 24 bytes and 64 KiB.
    pub fn receive(stream: &mut impl Read) -> Result<Self, HandshakeError> {
        let wire: ToolHelloWire = after_size(&read_sized(stream, TOOL_HELLO_SIZE)?);
        Ok(Self { cookie_hash: wire.cookie_hash })
    }

    /// The tool's second step: answers.
    ///
    /// # Errors
    /// Where the socket fails.
    pub fn send(&self, stream: &mut impl Write) -> Result<(), HandshakeError> {
        Ok(stream.write_all(&self.encode())?)
    }
}

/// Reads a size and the bytes that belong to it.
fn read_sized(stream: &mut impl Read, least: usize) -> Result<Vec<u8>, HandshakeError> {
    let mut size = [0; 4];
    stream.read_exact(&mut size)?;
    let size = checked_size(size, least)?;
    let mut bytes = vec![0; size - size_of::<u32>()];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn checked_size(bytes: [u8; 4], least: usize) -> Result<usize, HandshakeError> {
    let size = usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX);
    if size < least || size > MOST {
        return Err(HandshakeError::Size { size, least, most: MOST });
    }
    Ok(size)
}

/// A wire structure from the bytes after its size: what is missing is zero, what is surplus is
/// ignored.
fn after_size<T: FromZeros + FromBytes + IntoBytes>(bytes: &[u8]) -> T {
    let mut wire = T::new_zeroed();
    for (to, from) in wire.as_mut_bytes().iter_mut().skip(size_of::<u32>()).zip(bytes) {
        *to = *from;
    }
    wire
}

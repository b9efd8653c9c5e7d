// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages between a tool in a guest and the broker, over vsock: frames of a 32-bit little-endian
//! length, 1 to [`MAX_FRAME`], and that many bytes of JSON.
//!
//! ```text
//! {"open":{"token":"<64 hexadecimal digits>","read_only":true,"caller":{"pid":411,"uid":0,"comm":"scan"},"mapped_by":"module"}}
//! {"opened":{"view":17,"ticket":"<64 hexadecimal digits>"}}
//! {"refused":{"refusal":"unknown","message":"token is unknown, used, expired or revoked"}}
//! ```

use std::io::{self, Read, Write};

use kvmmem_kvmi::token::Token;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::message::{Caller, Refusal, token_text};

/// The vsock port at which the broker listens.
pub const GUEST_PORT: u32 = 27510;

/// The most bytes of JSON in a frame.
pub const MAX_FRAME: usize = 4096;

/// The bytes of a frame's length.
const LENGTH: usize = size_of::<u32>();

/// The most bytes of a refusal's words; written as JSON they may take twice that.
const MAX_MESSAGE: usize = 1500;

/// What a tool sends, once.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromTool {
    /// Asks for a view; the token is used up by it. Answer: [`ToTool`].
    Open {
        /// The token.
        #[serde(with = "token_text")]
        token: Token,
        /// Whether to open the view read-only, even if the grant allows writes.
        read_only: bool,
        /// The process that asks, as it says itself.
        caller: Caller,
        /// What maps the view's devices.
        #[serde(default)]
        mapped_by: MappedBy,
    },
}

/// What maps a view's devices in the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MappedBy {
    /// The kernel module.
    #[default]
    Module,
    /// The tool's library, through sysfs: in an introspector that is trusted as a whole.
    Library,
}

/// What the broker answers, once.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToTool {
    /// The view's devices are plugged in, and the guest's driver has seen them if the tool does
    /// not do without. The view lasts as long as the connection.
    Opened {
        /// The broker's number for the view.
        view: u64,
        /// The token by which `KVMMEM_ATTACH` takes the view, and no other.
        #[serde(with = "token_text")]
        ticket: Token,
    },
    /// There is no view. The broker closes the connection.
    Refused {
        /// Which kind of failure.
        refusal: Refusal,
        /// The failure in words, and what helps.
        message: String,
    },
}

impl ToTool {
    /// A refusal whose words fit in a frame and hold no control characters.
    pub fn refused(refusal: Refusal, words: &str) -> Self {
        let words = words.get(..words.floor_char_boundary(MAX_MESSAGE)).unwrap_or_default();
        let message = words.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        Self::Refused { refusal, message }
    }
}

/// Why a frame did not get through.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection failed, ended within a frame or was too slow.
    #[error("cannot read a frame")]
    Read(#[source] io::Error),
    /// The connection failed or the peer does not read.
    #[error("cannot write a frame")]
    Write(#[source] io::Error),
    /// The length is none.
    #[error("a frame has {0:#x} bytes, expected 0x1 to {MAX_FRAME:#x}")]
    Length(usize),
    /// The frame is not the JSON object that was expected.
    #[error("a frame is malformed")]
    Malformed(#[source] serde_json::Error),
    /// The message cannot be written as JSON.
    #[error("a message cannot be written")]
    Encode(#[source] serde_json::Error),
}

/// A frame that comes in pieces. No copy of it stays behind.
#[derive(Debug, Default)]
pub struct Frame {
    /// The length, and what follows as soon as that is known.
    bytes: Zeroizing<Vec<u8>>,
    filled: usize,
}

impl Frame {
    /// Reads what is missing; `None` where the peer has closed before the first byte. After a
    /// [`FrameError::Read`] it can be called again, and continues.
    ///
    /// # Errors
    /// [`FrameError::Read`], [`FrameError::Length`], [`FrameError::Malformed`].
    pub fn read<T: DeserializeOwned>(
        &mut self,
        from: &mut impl Read,
    ) -> Result<Option<T>, FrameError> {
        if self.bytes.is_empty() {
            self.bytes.resize(LENGTH, 0);
        }
        if self.bytes.len() == LENGTH {
            if !self.fill(from)? {
                return Ok(None);
            }
            let length = self.bytes.first_chunk().copied().unwrap_or_default();
            let length = u32::from_le_bytes(length) as usize;
            if !(1..=MAX_FRAME).contains(&length) {
                return Err(FrameError::Length(length));
            }
            self.bytes.resize(LENGTH + length, 0);
        }
        self.fill(from)?;
        let json = self.bytes.get(LENGTH..).unwrap_or_default();
        serde_json::from_slice(json).map(Some).map_err(FrameError::Malformed)
    }

    /// Fills the buffer; `false` where the peer has closed before the first byte.
    fn fill(&mut self, from: &mut impl Read) -> Result<bool, FrameError> {
        while let Some(rest) = self.bytes.get_mut(self.filled..).filter(|rest| !rest.is_empty()) {
            match from.read(rest) {
                Ok(0) if self.filled == 0 => return Ok(false),
                Ok(0) => return Err(FrameError::Read(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(FrameError::Read(error)),
            }
        }
        Ok(true)
    }
}

/// Reads a frame; `None` where the peer has closed before its first byte. No copy of it stays
/// behind.
///
/// # Errors
/// [`FrameError::Read`], [`FrameError::Length`], [`FrameError::Malformed`].
pub fn read<T: DeserializeOwned>(from: &mut impl Read) -> Result<Option<T>, FrameError> {
    Frame::default().read(from)
}

/// Writes a frame.
///
/// # Errors
/// [`FrameError::Write`], [`FrameError::Length`], [`FrameError::Encode`].
pub fn write(to: &mut impl Write, message: &impl Serialize) -> Result<(), FrameError> {
    // As large as it gets, so that no copy of a token is left behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(4 + MAX_FRAME));
    bytes.extend_from_slice(&[0; 4]);
    serde_json::to_writer(&mut *bytes, message).map_err(FrameError::Encode)?;
    let length = bytes.len() - 4;
    match (u32::try_from(length), bytes.first_chunk_mut::<4>()) {
        (Ok(number), Some(place)) if length <= MAX_FRAME => *place = number.to_le_bytes(),
        _ => return Err(FrameError::Length(length)),
    }
    to.write_all(&bytes).map_err(FrameError::Write)
}

#[cfg(test)]
mod tests;

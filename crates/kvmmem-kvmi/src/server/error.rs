// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a connection ends before the tool closes it.

use std::io;

use crate::dispatch::RepliesOff;
use crate::handshake::HandshakeError;
use crate::message::MAX_PAYLOAD;

/// Why a connection ended other than by the tool closing it between two messages.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The handshake failed.
    #[error("KVMI handshake failed")]
    Handshake(#[source] HandshakeError),
    /// Reading failed, or the tool stopped in the middle of a message.
    #[error("cannot read from the KVMI socket")]
    Read(#[source] io::Error),
    /// Writing failed, or the tool does not read its replies.
    #[error("cannot write to the KVMI socket")]
    Write(#[source] io::Error),
    /// The tool closed in the middle of a message.
    #[error("the tool closed the connection within a message")]
    Truncated,
    /// A payload is larger than the protocol allows.
    #[error(
        "command {id} announces {size:#x} bytes of payload, at most {MAX_PAYLOAD:#x} are allowed"
    )]
    TooLong {
        /// The command.
        id: u16,
        /// The announced size.
        size: u16,
    },
    /// The tool asked for data with the replies off.
    #[error("the tool broke the protocol")]
    RepliesOff(#[source] RepliesOff),
}

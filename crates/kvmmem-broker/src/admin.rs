// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the command line asks of the broker.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::endpoint::Endpoint;
use crate::packet::{PacketBuffer, PacketError, PacketSocket, Wait};
use crate::wire::{Answer, Call, FromBroker, Refusal, Request};
pub use crate::wire::{HookInfo, TargetInfo};

/// How long the broker may take to answer.
const LIMIT: Duration = Duration::from_secs(5);

/// A connection to the broker that registers nothing. The broker closes it after 10 s of silence.
pub struct Admin {
    socket: PacketSocket,
    buffer: PacketBuffer,
    last_request: u64,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The broker cannot be reached.
    #[error("cannot reach the broker at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: PacketError,
    },
    /// The connection failed.
    #[error("connection to the broker failed")]
    Packet(#[from] PacketError),
    /// The broker closed the connection or answered something else.
    #[error("the broker gave no answer")]
    NoAnswer,
    /// The broker refused.
    #[error("{message}")]
    Refused {
        /// Which kind of failure.
        refusal: Refusal,
        /// The broker's words.
        message: String,
    },
}

impl Admin {
    /// Connects to the broker that listens at `path`.
    ///
    /// # Errors
    /// [`AdminError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, AdminError> {
        let connect = || {
            let socket = PacketSocket::connect(path, LIMIT)?;
            socket.limit_receive(Some(LIMIT))?;
            Ok(socket)
        };
        let socket = connect().map_err(|source| AdminError::Connect { path: path.to_owned(), source })?;
        Ok(Self { socket, buffer: PacketBuffer::default(), last_request: 0 })
    }

    /// The registered VMs.
    ///
    /// # Errors
    /// [`AdminError`].
    pub fn targets(&mut self) -> Result<Vec<TargetInfo>, AdminError> {
        let mut all: Vec<TargetInfo> = Vec::new();
        loop {
            let after = all.last().map_or(0, |target| target.id);
            let Answer::Targets { targets, more } = self.ask(Call::Targets { after })? else {
                return Err(AdminError::NoAnswer);
            };
            let empty = targets.is_empty();
            all.extend(targets);
            if !more || empty {
                return Ok(all);
            }
        }
    }

    /// Connects a target, given by name or UUID, to a tool that listens for KVMI at `endpoint`, now and whenever the
    /// connection ends.
    ///
    /// # Errors
    /// [`AdminError`].
    pub fn hook(&mut self, target: &str, endpoint: &Endpoint) -> Result<(), AdminError> {
        let call = Call::Hook { target: target.to_owned(), endpoint: endpoint.clone() };
        self.ask(call).map(|_| ())
    }

    /// Undoes a hook and ends its connection.
    ///
    /// # Errors
    /// [`AdminError`].
    pub fn unhook(&mut self, target: &str, endpoint: &Endpoint) -> Result<(), AdminError> {
        let call = Call::Unhook { target: target.to_owned(), endpoint: endpoint.clone() };
        self.ask(call).map(|_| ())
    }

    fn ask(&mut self, call: Call) -> Result<Answer, AdminError> {
        self.last_request += 1;
        let asked = self.last_request;
        // A broker that is full says so and closes, perhaps before this is sent.
        let sent = self.socket.send(&Request { id: asked, call }, None, Wait::Limited);
        loop {
            match self.socket.receive(&mut self.buffer)? {
                Some((FromBroker::Answer { id, answer }, _)) if id == asked => return Ok(answer),
                Some((FromBroker::Refused { id, refusal, message }, _)) if id == asked || id == 0 => {
                    return Err(AdminError::Refused { refusal, message });
                }
                Some(_) => {}
                None => return Err(sent.err().map_or(AdminError::NoAnswer, AdminError::Packet)),
            }
        }
    }
}

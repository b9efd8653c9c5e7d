// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The VM's side of a connection: handshake, then one reply for each request, until the tool
//! closes.
//!
//! An idle tool is waited for without limit; to stop, shut the socket down from another thread. A
//! tool that has begun a handshake or a message, or that does not read its replies, has a limited
//! time to continue ([`Limits`]).

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::command;
use crate::dispatch::{Dispatcher, RepliesOff, ReplyBuffer, TargetVm};
use crate::handshake::{HandshakeError, ToolHello, VmHello};
use crate::message::{HEADER_SIZE, Header, MAX_PAYLOAD};

/// How long the server waits for a tool that is late.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For the tool's half of the handshake.
    pub handshake: Duration,
    /// For a message from its first byte to its last, and for a write of a reply.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { handshake: Duration::from_secs(10), stall: Duration::from_secs(15) }
    }
}

/// A connected stream socket, blocking.
pub trait Socket: Read + Write {
    /// Limits how long a read waits; `None` for ever.
    ///
    /// # Errors
    /// Those of `setsockopt`.
    fn limit_reads(&self, limit: Option<Duration>) -> io::Result<()>;

    /// Limits how long a write waits.
    ///
    /// # Errors
    /// Those of `setsockopt`.
    fn limit_writes(&self, limit: Duration) -> io::Result<()>;
}

impl<S: Read + Write + AsFd> Socket for S {
    fn limit_reads(&self, limit: Option<Duration>) -> io::Result<()> {
        Ok(set_socket_timeout(self, Timeout::Recv, limit)?)
    }

    fn limit_writes(&self, limit: Duration) -> io::Result<()> {
        Ok(set_socket_timeout(self, Timeout::Send, Some(limit))?)
    }
}

/// Why a connection ended other than by the tool closing it between two messages.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The handshake failed.
    #[error("KVMI handshake failed")]
    Handshake(#[source] HandshakeError),
    /// The socket's options cannot be set.
    #[error("cannot limit the waits of the KVMI socket")]
    Limit(#[source] io::Error),
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
        /// What its header says.
        size: u16,
    },
    /// The tool asked for data with the replies off.
    #[error("the tool broke the protocol")]
    RepliesOff(#[source] RepliesOff),
}

/// Greets the tool and serves it until it closes.
///
/// `connected` is called once the handshake is done.
///
/// # Errors
/// Why the connection had to end before the tool closed it.
pub fn serve<S: Socket>(
    stream: &mut S,
    vm: &impl TargetVm,
    connected: impl FnOnce(),
) -> Result<(), ServeError> {
    serve_within(Limits::default(), stream, vm, connected)
}

/// As [`serve`], with other limits than the protocol's usual ones.
///
/// # Errors
/// Why the connection had to end before the tool closed it.
pub fn serve_within<S: Socket>(
    limits: Limits,
    stream: &mut S,
    vm: &impl TargetVm,
    connected: impl FnOnce(),
) -> Result<(), ServeError> {
    stream.limit_writes(limits.stall).map_err(ServeError::Limit)?;
    greet(stream, vm, limits.handshake).map_err(ServeError::Handshake)?;
    stream.limit_reads(None).map_err(ServeError::Limit)?;
    connected();

    let mut inbox = Inbox::new(limits.stall);
    let mut dispatcher = Dispatcher::default();
    let mut reply = ReplyBuffer::default();
    while let Some((header, payload)) = inbox.next(stream)? {
        let bytes =
            dispatcher.answer(vm, header, payload, &mut reply).map_err(ServeError::RepliesOff)?;
        if let Some(bytes) = bytes {
            stream.write_all(bytes).map_err(ServeError::Write)?;
        }
        if header.id.get() == command::GET_MAP_TOKEN {
            reply.wipe();
        }
    }
    Ok(())
}

fn greet<S: Socket>(
    stream: &mut S,
    vm: &impl TargetVm,
    limit: Duration,
) -> Result<(), HandshakeError> {
    let hello =
        VmHello { uuid: vm.uuid(), start_time_ms: vm.start_time_ms(), name: vm.name().to_owned() };
    hello.send(stream)?;
    // No cookie is configured on this side, so any hash will do, as with QEMU.
    ToolHello::receive(&mut Deadline { stream, end: Instant::now() + limit }).map(|_| ())
}

/// Reads that together end at a point in time.
struct Deadline<'s, S> {
    stream: &'s mut S,
    end: Instant,
}

impl<S: Socket> Read for Deadline<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.limit_reads(Some(left))?;
        self.stream.read(buffer)
    }
}

/// Bytes that have come and are not yet served. Has room for one message of the largest size, so
/// that a usual request takes one read, and a batch of small ones as well.
struct Inbox {
    bytes: Box<[u8; HEADER_SIZE + MAX_PAYLOAD]>,
    start: usize,
    end: usize,
    /// How long a message may take from its first byte to its last.
    stall: Duration,
}

impl Inbox {
    fn new(stall: Duration) -> Self {
        Self { bytes: Box::new([0; HEADER_SIZE + MAX_PAYLOAD]), start: 0, end: 0, stall }
    }

    /// The next message; `None` when the tool has closed between two.
    fn next<S: Socket>(&mut self, stream: &mut S) -> Result<Option<(Header, &[u8])>, ServeError> {
        let mut begun = None;
        let header = loop {
            let waiting = self.bytes.get(self.start..self.end).unwrap_or_default();
            if let Some(header) = Header::parse(waiting) {
                let size = usize::from(header.size.get());
                if size > MAX_PAYLOAD {
                    return Err(ServeError::TooLong {
                        id: header.id.get(),
                        size: header.size.get(),
                    });
                }
                if waiting.len() >= HEADER_SIZE + size {
                    break header;
                }
            }
            let partial = !waiting.is_empty();
            if partial {
                let end = *begun.get_or_insert_with(|| Instant::now() + self.stall);
                if self.fill(&mut Deadline { stream, end })? == 0 {
                    return Err(ServeError::Truncated);
                }
            } else if self.fill(stream)? == 0 {
                return Ok(None);
            }
        };
        if begun.is_some() {
            stream.limit_reads(None).map_err(ServeError::Limit)?;
        }
        let payload = self.start + HEADER_SIZE;
        self.start = payload + usize::from(header.size.get());
        Ok(Some((header, self.bytes.get(payload..self.start).unwrap_or_default())))
    }

    /// Reads what has come behind what waits already; 0 at the end of the stream.
    fn fill(&mut self, stream: &mut impl Read) -> Result<usize, ServeError> {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let room = self.bytes.get_mut(self.end..).unwrap_or_default();
        loop {
            match stream.read(room) {
                Ok(count) => {
                    self.end += count;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ServeError::Read(error)),
            }
        }
    }
}

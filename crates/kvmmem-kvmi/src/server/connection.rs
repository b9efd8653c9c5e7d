// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A connection that is served in turns.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::error::ServeError;
use super::inbox::Inbox;
use crate::command;
use crate::dispatch::{Dispatcher, ReplyBuffer, TargetVm};
use crate::handshake::{HandshakeError, ToolHello, VmHello};

/// The most reads of one turn.
const READS: usize = 16;

/// How long the server waits for a tool that is late.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For the tool's half of the handshake.
    pub handshake: Duration,
    /// For a message from its first byte to its last, and for a reply that the tool does not read.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { handshake: Duration::from_secs(10), stall: Duration::from_secs(15) }
    }
}

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There may be more to do at once.
    More,
    /// The tool has sent nothing more. The deadline is for a message that has begun.
    Read(Option<Instant>),
    /// The tool has to read before the deadline.
    Write(Instant),
    /// The tool has closed.
    Closed,
}

/// What a turn works with; any turn of any connection can have it.
#[derive(Default)]
pub struct Workspace {
    inbox: Inbox,
    reply: ReplyBuffer,
}

/// A connection between two turns.
#[derive(Debug)]
pub struct Connection {
    limits: Limits,
    stage: Stage,
    dispatcher: Dispatcher,
    /// What has come of a message that is not complete, or cannot be answered yet.
    received: Vec<u8>,
    /// What the tool has not read yet.
    unsent: Zeroizing<Vec<u8>>,
    /// When what has begun must be over.
    deadline: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// The tool's hello has not begun.
    Hello,
    /// So many bytes of it are missing.
    HelloLeft(usize),
    Serving,
}

impl Connection {
    /// Begins the handshake for a VM.
    pub fn new(vm: &impl TargetVm, limits: Limits) -> Self {
        let name = vm.name().to_owned();
        let hello = VmHello { uuid: vm.uuid(), start_time_ms: vm.start_time_ms(), name };
        Self {
            limits,
            stage: Stage::Hello,
            dispatcher: Dispatcher::default(),
            received: Vec::new(),
            unsent: hello.encode().to_vec().into(),
            deadline: Some(Instant::now() + limits.handshake),
        }
    }

    /// Whether the handshake is done.
    pub fn is_greeted(&self) -> bool {
        matches!(self.stage, Stage::Serving)
    }

    /// Answers what has come, and reads more a limited number of times. The turn ends where the
    /// stream would block, and with the handshake.
    ///
    /// # Errors
    /// Why the connection has to end before the tool closes it.
    pub fn turn(
        &mut self,
        stream: &mut (impl Read + Write),
        vm: &impl TargetVm,
        space: &mut Workspace,
    ) -> Result<Turn, ServeError> {
        if !self.unsent.is_empty() {
            let unsent = std::mem::take(&mut self.unsent);
            if !self.send(stream, &unsent)? {
                return self.wait_writable();
            }
            if self.is_greeted() {
                self.deadline = None;
            }
        }
        space.inbox.load(&self.received);
        let turn = self.exchange(stream, vm, space);
        // An idle connection keeps no memory.
        self.received = space.inbox.waiting().to_vec();
        turn
    }

    fn exchange(
        &mut self,
        stream: &mut (impl Read + Write),
        vm: &impl TargetVm,
        space: &mut Workspace,
    ) -> Result<Turn, ServeError> {
        let Workspace { inbox, reply } = space;
        for _ in 0..READS {
            if self.greet(inbox)? {
                return Ok(Turn::More);
            }
            while self.is_greeted()
                && let Some((header, payload)) = inbox.next()?
            {
                self.deadline = None;
                let answer = self.dispatcher.answer(vm, header, payload, reply);
                let is_sent = match answer.map_err(ServeError::RepliesOff)? {
                    Some(bytes) => self.send(stream, bytes)?,
                    None => true,
                };
                if header.id.get() == command::GET_MAP_TOKEN {
                    reply.wipe();
                }
                if !is_sent {
                    return self.wait_writable();
                }
            }
            match inbox.fill(stream) {
                Ok(0) if !self.is_greeted() => {
                    return Err(self.late(io::ErrorKind::UnexpectedEof.into()));
                }
                Ok(0) if inbox.waiting().is_empty() => return Ok(Turn::Closed),
                Ok(0) => return Err(ServeError::Truncated),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.deadline.is_none() && !inbox.waiting().is_empty() {
                        self.deadline = Some(Instant::now() + self.limits.stall);
                    }
                    if self.is_late() {
                        return Err(self.late(io::ErrorKind::TimedOut.into()));
                    }
                    return Ok(Turn::Read(self.deadline));
                }
                Err(error) => return Err(self.late(error)),
            }
        }
        // One that drips is late at some time too.
        if self.is_late() {
            return Err(self.late(io::ErrorKind::TimedOut.into()));
        }
        Ok(Turn::More)
    }

    /// Takes what has come of the tool's hello; whether that ends the handshake. No cookie is
    /// configured on this side, so any hash will do, as with QEMU.
    fn greet(&mut self, inbox: &mut Inbox) -> Result<bool, ServeError> {
        if let (Stage::Hello, Some(size)) = (self.stage, inbox.waiting().first_chunk()) {
            self.stage = Stage::HelloLeft(ToolHello::size(*size).map_err(ServeError::Handshake)?);
        }
        let Stage::HelloLeft(left) = self.stage else { return Ok(false) };
        self.stage = match left - inbox.skip(left) {
            0 => Stage::Serving,
            left => Stage::HelloLeft(left),
        };
        let is_done = self.is_greeted();
        if is_done {
            self.deadline = None;
        }
        Ok(is_done)
    }

    /// Sends bytes, and keeps those that the socket does not take; returns whether all were sent.
    fn send(&mut self, stream: &mut impl Write, mut bytes: &[u8]) -> Result<bool, ServeError> {
        while !bytes.is_empty() {
            match stream.write(bytes) {
                Ok(0) => return Err(ServeError::Write(io::ErrorKind::WriteZero.into())),
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.unsent = bytes.to_vec().into();
                    return Ok(false);
                }
                Err(error) => return Err(ServeError::Write(error)),
            }
        }
        Ok(true)
    }

    fn wait_writable(&mut self) -> Result<Turn, ServeError> {
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + self.limits.stall);
        if self.is_late() {
            return Err(ServeError::Write(io::ErrorKind::TimedOut.into()));
        }
        Ok(Turn::Write(deadline))
    }

    fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= Instant::now())
    }

    /// Of a failed read.
    pub(super) fn late(&self, error: io::Error) -> ServeError {
        if self.is_greeted() {
            ServeError::Read(error)
        } else {
            ServeError::Handshake(HandshakeError::Io(error))
        }
    }
}

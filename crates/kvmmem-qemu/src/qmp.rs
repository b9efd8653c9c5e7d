// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A QEMU's machine protocol, QMP: lines of JSON over a unix socket.
//!
//! QEMU serves one client at a time; others connect and hear nothing. So everything has a limit,
//! and a connection on which anything but a refusal went wrong is of no use any more: what came
//! next could be the answer to what was asked before.

mod error;
pub(crate) mod line;
pub(crate) mod message;
pub mod questions;
mod registers;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvmmem_sys::socket::peer_credentials;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::file_id::FileId;
use crate::unix_socket;
pub use error::QmpError;
use line::{LineError, Lines, MAX_RECEIVED};
use message::Message;
pub use message::QmpEvent;

/// How long a command may take, and a whole conversation.
pub const LIMIT: Duration = Duration::from_secs(2);

/// The command that makes QEMU answer others, and the id that its answer has to have.
const CAPABILITIES: &str = "qmp_capabilities";

/// How soon a connection is tried again while the socket's queue of connections is full.
const FULL_QUEUE_PAUSE: Duration = Duration::from_millis(20);

/// The most events that are kept until they are taken, that come before an answer, and that are
/// taken in one turn.
pub(crate) const MAX_EVENTS: usize = 256;

/// A connection that QEMU answers on: its own, or one that is lent by the
/// [`Monitor`](crate::monitor::Monitor) that others use as well.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    channel: Channel,
    /// When the whole conversation must be over.
    end: Option<Instant>,
    /// Something went wrong: nothing is asked any more.
    is_broken: bool,
}

#[derive(Debug)]
enum Channel {
    Own { lines: Lines, events: VecDeque<QmpEvent>, file: Option<FileId> },
    Lent(Box<dyn SharedConnection>),
}

/// A connection that others use as well.
pub(crate) trait SharedConnection: fmt::Debug + Send + Sync {
    /// Carries out a command, and waits for its answer until `end`.
    fn execute(
        &self,
        command: &'static str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
        end: Option<Instant>,
    ) -> Result<Box<RawValue>, QmpError>;

    /// Ends the connection for all: an answer made no sense.
    fn fail(&self);

    /// The connection.
    fn socket(&self) -> BorrowedFd<'_>;
}

/// A file descriptor that QEMU has taken over, as `add-fd` returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddedFd {
    /// Number of its set.
    pub fdset_id: u64,
    /// Its number in QEMU's process.
    pub fd: u32,
}

impl Qmp {
    /// Connects, and does what QEMU wants before it answers. Each command may take [`LIMIT`] from
    /// then on.
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        let deadline = Instant::now() + LIMIT;
        let (socket, file) = loop {
            match unix_socket::connect(path) {
                Ok(socket) => break socket,
                // As many clients wait for QEMU as may: it serves one, and queues few.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if Instant::now() >= deadline {
                        return Err(QmpError::Silent(path.to_owned()));
                    }
                    std::thread::sleep(FULL_QUEUE_PAUSE);
                }
                Err(source) => return Err(QmpError::Connect { path: path.to_owned(), source }),
            }
        };
        let lines = Lines::new(socket);
        let channel = Channel::Own { lines, events: VecDeque::new(), file };
        let mut qmp = Self { path: path.to_owned(), channel, end: None, is_broken: false };
        // Nothing is sent to what does not greet as QEMU does. Before the greeting, and before the
        // answer with this id, there may be an answer that came too late for the client before.
        const GREETING: &str = "the connection";
        let deadline = qmp.deadline();
        let is_greeting = |message: &Message| {
            let is_late = message.is_of_qemu().then_some(false);
            if message.greeting.is_some() { Some(true) } else { is_late }
        };
        qmp.wait_for(GREETING, deadline, is_greeting)?;
        let text = format!("{}\n", json!({ "execute": CAPABILITIES, "id": CAPABILITIES }));
        let deadline = qmp.deadline();
        qmp.own(|lines, _| lines.send(text.as_bytes(), None, deadline))?;
        let has_id = |message: &Message| Some(message.has_id(CAPABILITIES));
        qmp.wait_for(CAPABILITIES, deadline, has_id)?.into_result(CAPABILITIES)?;
        Ok(qmp)
    }

    /// A conversation over a connection that is another's.
    pub(crate) fn over(path: PathBuf, lent: Box<dyn SharedConnection>) -> Self {
        Self { path, channel: Channel::Lent(lent), end: None, is_broken: false }
    }

    /// The connection with the events that have come, for a monitor, and the socket's file; `None`
    /// where it is lent.
    pub(crate) fn into_own(self) -> Option<(Lines, VecDeque<QmpEvent>, Option<FileId>)> {
        match self.channel {
            Channel::Own { lines, events, file } => Some((lines, events, file)),
            Channel::Lent(_) => None,
        }
    }

    /// A conversation that ends after `limit` in all.
    #[must_use]
    pub(crate) fn within(self, limit: Duration) -> Self {
        Self { end: Some(Instant::now() + limit), ..self }
    }

    /// Where it is connected to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The state that the VM is in, such as `running` or `paused`.
    pub fn status(&mut self) -> Result<String, QmpError> {
        let answer = self.execute("query-status", json!({}))?;
        Ok(answer.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// The process that listens: QEMU itself, or the one that handed it the socket.
    pub fn listener(&self) -> Option<u32> {
        peer_credentials(self).ok()?.pid
    }

    /// Carries out a command; `arguments` is an object.
    ///
    /// # Errors
    /// [`QmpError`]. After all but [`QmpError::Refused`] nothing more can be asked.
    pub fn execute(&mut self, command: &'static str, arguments: Value) -> Result<Value, QmpError> {
        self.ask(command, arguments)
    }

    /// Hands a file descriptor over, into a new set or into `fdset`. `/proc/self/fd/N` names it for
    /// QEMU from then on.
    pub fn add_fd(&mut self, fd: BorrowedFd<'_>, fdset: Option<u64>) -> Result<AddedFd, QmpError> {
        let arguments = fdset.map_or_else(|| json!({}), |fdset| json!({ "fdset-id": fdset }));
        self.ask_with("add-fd", &arguments, Some(fd))
    }

    pub(crate) fn ask<T: DeserializeOwned>(
        &mut self,
        command: &'static str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        self.ask_with(command, &arguments, None)
    }

    fn ask_with<T: DeserializeOwned>(
        &mut self,
        command: &'static str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<T, QmpError> {
        let answer = self.run(command, arguments, fd)?;
        serde_json::from_str(answer.get()).map_err(|_| self.garbage(command))
    }

    fn run(
        &mut self,
        command: &'static str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Box<RawValue>, QmpError> {
        self.check()?;
        if let Channel::Lent(lent) = &self.channel {
            let result = lent.execute(command, arguments, fd, self.end);
            self.is_broken = result.as_ref().is_err_and(|error| !error.is_refusal());
            return result;
        }
        let deadline = self.deadline();
        let text = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.own(|lines, _| lines.send(text.as_bytes(), fd, deadline))?;
        self.wait_for(command, deadline, |message| Some(message.is_answer()))?.into_result(command)
    }

    /// The first message that is wanted; where `is_wanted` returns `None` the connection is of no
    /// use. Events before it are kept.
    fn wait_for(
        &mut self,
        command: &'static str,
        deadline: Instant,
        is_wanted: impl Fn(&Message) -> Option<bool>,
    ) -> Result<Message, QmpError> {
        // What comes before it does not put the deadline off, and what has come by then is not
        // late: so each message is counted.
        for _ in 0..=MAX_EVENTS {
            let message = self.message(command, deadline)?;
            if is_wanted(&message).ok_or_else(|| self.garbage(command))? {
                return Ok(message);
            }
            self.own(|_, events| {
                events.extend(message.into_event());
                if events.len() > MAX_EVENTS { Err(LineError::TooMuch) } else { Ok(()) }
            })?;
        }
        self.own(|_, _| Err(LineError::TooMuch))
    }

    fn message(&mut self, command: &'static str, deadline: Instant) -> Result<Message, QmpError> {
        let line = self.own(|lines, _| lines.next(deadline))?;
        serde_json::from_slice(&line).map_err(|_| self.garbage(command))
    }

    /// Does something with this conversation's own connection, which is broken where it fails.
    fn own<T>(
        &mut self,
        work: impl FnOnce(&mut Lines, &mut VecDeque<QmpEvent>) -> Result<T, LineError>,
    ) -> Result<T, QmpError> {
        let done = match &mut self.channel {
            Channel::Own { lines, events, .. } => work(lines, events),
            Channel::Lent(_) => Err(LineError::Silent),
        };
        done.map_err(|error| {
            self.is_broken = true;
            error.of(&self.path)
        })
    }

    /// A conversation hears what it waits for alone: the rest is bounded by its end.
    fn deadline(&mut self) -> Instant {
        if let Channel::Own { lines, .. } = &mut self.channel {
            lines.begin(MAX_RECEIVED);
        }
        let deadline = Instant::now() + LIMIT;
        self.end.map_or(deadline, |end| end.min(deadline))
    }

    fn check(&self) -> Result<(), QmpError> {
        let source = io::Error::from(io::ErrorKind::NotConnected);
        if self.is_broken {
            Err(QmpError::Connection { path: self.path.clone(), source })
        } else {
            Ok(())
        }
    }

    pub(crate) fn garbage(&mut self, command: &'static str) -> QmpError {
        self.is_broken = true;
        if let Channel::Lent(lent) = &self.channel {
            lent.fail();
        }
        QmpError::Garbage { path: self.path.clone(), command }
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.channel {
            Channel::Own { lines, .. } => lines.stream().as_fd(),
            Channel::Lent(lent) => lent.socket(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;

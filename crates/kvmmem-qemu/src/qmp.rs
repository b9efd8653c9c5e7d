// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A QEMU's machine protocol, QMP: lines of JSON over a unix socket.
//!
//! QEMU serves one client at a time; others connect and hear nothing. So everything has a limit,
//! and a connection on which anything but a refusal went wrong is of no use any more: what came
//! next could be the answer to what was asked before.

mod error;
mod line;
mod message;
mod questions;
mod registers;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::endpoint::connect;
use kvmmem_sys::socket::peer_credentials;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

pub use error::QmpError;
use line::{LineError, Lines};
use message::Message;
pub use message::QmpEvent;
pub use questions::{MemoryBackend, MemoryDevice, MemoryDeviceData, MemorySize};

/// How long a command may take, and a whole conversation.
pub const LIMIT: Duration = Duration::from_secs(2);

/// How soon a connection is tried again while the socket's queue of connections is full.
const FULL_QUEUE_PAUSE: Duration = Duration::from_millis(10);

/// The most events that are kept until they are taken, that come before an answer, and that are
/// taken in one turn.
const MAX_EVENTS: usize = 256;

/// How long events are taken in one turn.
const TURN: Duration = Duration::from_millis(50);

/// The most characters that are kept of what QEMU says of a failure.
const MAX_DESCRIPTION: usize = 200;

/// A connection that QEMU answers on.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    lines: Lines,
    /// When the whole conversation must be over.
    end: Option<Instant>,
    events: VecDeque<QmpEvent>,
    /// Something went wrong: nothing is asked any more.
    is_broken: bool,
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
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        Self::open(path, None)
    }

    /// The same for a conversation that ends after [`LIMIT`] in all, the connecting included.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn converse(path: &Path) -> Result<Self, QmpError> {
        Self::open(path, Some(Instant::now() + LIMIT))
    }

    fn open(path: &Path, end: Option<Instant>) -> Result<Self, QmpError> {
        let deadline = end.unwrap_or_else(|| Instant::now() + LIMIT);
        let endpoint = Endpoint::Unix(path.to_owned());
        let socket = loop {
            match connect(&endpoint) {
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
        let lines = Lines::new(UnixStream::from(socket));
        let mut qmp =
            Self { path: path.to_owned(), lines, end, events: VecDeque::new(), is_broken: false };
        // Nothing is sent to what does not greet as QEMU does.
        const GREETING: &str = "the connection";
        let deadline = qmp.deadline(LIMIT);
        if qmp.message(GREETING, deadline)?.greeting.is_none() {
            return Err(qmp.garbage(GREETING));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Makes a conversation that need not end: each command may take [`LIMIT`] from now on.
    #[must_use]
    pub fn endless(self) -> Self {
        Self { end: None, ..self }
    }

    /// Where it is connected to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nothing can be asked any more.
    pub(crate) fn is_broken(&self) -> bool {
        self.is_broken
    }

    /// The state that the VM is in, such as `running` or `paused`.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn status(&mut self) -> Result<String, QmpError> {
        let answer = self.execute("query-status", json!({}))?;
        Ok(answer.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// The process that listens: QEMU itself, or whoever handed it the socket.
    pub fn listener(&self) -> Option<u32> {
        peer_credentials(self.lines.stream()).ok()?.pid
    }

    /// Carries out a command; `arguments` is an object.
    ///
    /// # Errors
    /// [`QmpError`]. After all but [`QmpError::Refused`] nothing more can be asked.
    pub fn execute(&mut self, command: &'static str, arguments: Value) -> Result<Value, QmpError> {
        self.run(command, &arguments, None)
    }

    /// Hands a file descriptor over, into a new set or into `fdset`. `/proc/self/fd/N` names it for
    /// QEMU from then on.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn add_fd(&mut self, fd: BorrowedFd<'_>, fdset: Option<u64>) -> Result<AddedFd, QmpError> {
        let arguments = fdset.map_or_else(|| json!({}), |fdset| json!({ "fdset-id": fdset }));
        let answer = self.run("add-fd", &arguments, Some(fd))?;
        self.read_answer("add-fd", answer)
    }

    /// Takes the events that have come, those between commands and their answers first. Does not
    /// wait, and takes no more than a turn's: returns whether more may be there. A QEMU that
    /// sends events faster than they are taken is thus left in between.
    ///
    /// # Errors
    /// [`QmpError`], as [`Self::execute`].
    pub fn take_events(&mut self, mut take: impl FnMut(QmpEvent)) -> Result<bool, QmpError> {
        const EVENTS: &str = "no command";
        let began = Instant::now();
        self.lines.begin();
        for _ in 0..MAX_EVENTS {
            if let Some(event) = self.events.pop_front() {
                take(event);
                continue;
            }
            self.check()?;
            match self.lines.next(began) {
                Ok(line) => {
                    let message = self.parse(EVENTS, &line)?;
                    if message.is_answer() {
                        return Err(self.garbage(EVENTS));
                    }
                    message.into_event().map(&mut take);
                }
                Err(LineError::Silent) => return Ok(false),
                Err(error) => return Err(self.failed(error)),
            }
            if began.elapsed() >= TURN {
                break;
            }
        }
        Ok(true)
    }

    fn ask<T: DeserializeOwned>(
        &mut self,
        command: &'static str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let answer = self.execute(command, arguments)?;
        self.read_answer(command, answer)
    }

    fn read_answer<T: DeserializeOwned>(
        &mut self,
        command: &'static str,
        answer: Value,
    ) -> Result<T, QmpError> {
        serde_json::from_value(answer).map_err(|_| self.garbage(command))
    }

    fn run(
        &mut self,
        command: &'static str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        self.check()?;
        let deadline = self.deadline(LIMIT);
        let mut text = json!({ "execute": command, "arguments": arguments }).to_string();
        text.push('\n');
        self.lines.send(text.as_bytes(), fd, deadline).map_err(|error| self.failed(error))?;
        // What comes before the answer does not put the deadline off, and what has come by then is
        // not late: so it is counted, whatever it is.
        for _ in 0..=MAX_EVENTS {
            let message = self.message(command, deadline)?;
            if !message.is_answer() {
                self.keep(message)?;
                continue;
            }
            if let Some(failure) = message.error {
                let description = failure.desc.chars().take(MAX_DESCRIPTION).collect();
                return Err(QmpError::Refused { command, description });
            }
            return Ok(message.answer.unwrap_or_default());
        }
        Err(self.failed(LineError::TooMuch))
    }

    fn message(&mut self, command: &'static str, deadline: Instant) -> Result<Message, QmpError> {
        let line = self.lines.next(deadline).map_err(|error| self.failed(error))?;
        self.parse(command, &line)
    }

    fn parse(&mut self, command: &'static str, line: &[u8]) -> Result<Message, QmpError> {
        serde_json::from_slice(line).map_err(|_| self.garbage(command))
    }

    /// Keeps what may be an event.
    fn keep(&mut self, message: Message) -> Result<(), QmpError> {
        if self.events.len() >= MAX_EVENTS {
            return Err(self.failed(LineError::TooMuch));
        }
        self.events.extend(message.into_event());
        Ok(())
    }

    /// A conversation hears what it waits for alone: the rest is bounded by its end.
    fn deadline(&mut self, limit: Duration) -> Instant {
        self.lines.begin();
        let deadline = Instant::now() + limit;
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

    fn failed(&mut self, error: LineError) -> QmpError {
        self.is_broken = true;
        let path = self.path.clone();
        match error {
            LineError::Silent => QmpError::Silent(path),
            LineError::TooMuch => QmpError::TooMuch(path),
            LineError::Io(source) => QmpError::Connection { path, source },
        }
    }

    fn garbage(&mut self, command: &'static str) -> QmpError {
        self.is_broken = true;
        QmpError::Garbage { path: self.path.clone(), command }
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lines.stream().as_fd()
    }
}

#[cfg(test)]
pub(crate) mod tests;

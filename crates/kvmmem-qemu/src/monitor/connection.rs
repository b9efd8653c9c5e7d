// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One connection of a monitor: lines in, one command at a time out. Never waits.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::file_id::FileId;
use crate::qmp::line::{LineError, Lines, MAX_SHORT};
use crate::qmp::message::Message;
use crate::qmp::{LIMIT, MAX_EVENTS, Qmp, QmpError, QmpEvent};

/// How long a step reads: the thread has other monitors to step.
const TURN: Duration = Duration::from_millis(2);

/// Gets the answer to a command.
type Reply = Box<dyn FnOnce(Answer) + Send>;

/// QEMU's answer as JSON that is not parsed yet, or the error.
pub(super) type Answer = Result<Box<RawValue>, QmpError>;

/// A command that is to be sent.
pub(super) struct Command {
    name: &'static str,
    text: String,
    fd: Option<OwnedFd>,
    /// The most bytes that its answer may have, with what comes before it.
    most: usize,
    reply: Reply,
}

/// The command that QEMU has to answer next.
struct UnderWay {
    name: &'static str,
    deadline: Instant,
    /// How many other messages have come since.
    others: usize,
    reply: Reply,
}

/// What comes of a step.
pub(super) enum Output {
    Event(QmpEvent),
    Answer(Reply, Answer),
    Lost,
    Found,
}

pub(super) struct Connection {
    lines: Lines,
    /// Those that came before this was made.
    events: VecDeque<QmpEvent>,
    /// The socket's file.
    pub(super) file: Option<FileId>,
    under_way: Option<UnderWay>,
    waiting: VecDeque<Command>,
}

impl Command {
    pub(super) fn new(
        name: &'static str,
        arguments: &Value,
        fd: Option<OwnedFd>,
        most: usize,
        reply: Reply,
    ) -> Self {
        let text = format!("{}\n", json!({ "execute": name, "arguments": arguments }));
        Self { name, text, fd, most, reply }
    }

    pub(super) fn fail(self, error: QmpError) {
        (self.reply)(Err(error));
    }
}

impl Output {
    /// Passes an answer on.
    pub(super) fn answer(self) {
        if let Self::Answer(reply, result) = self {
            reply(result);
        }
    }
}

impl Connection {
    /// One that was opened for a conversation; `None` where it was lent.
    pub(super) fn of(qmp: Qmp) -> Option<Self> {
        let (lines, events, file) = qmp.into_own()?;
        Some(Self { lines, events, file, under_way: None, waiting: VecDeque::new() })
    }

    pub(super) fn stream(&self) -> &Arc<OwnedFd> {
        self.lines.stream()
    }

    /// When the command under way fails.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.under_way.as_ref().map(|under_way| under_way.deadline)
    }

    /// Sends a command, as soon as those before it are answered.
    pub(super) fn put(&mut self, command: Command) {
        self.waiting.push_back(command);
        if self.under_way.is_none() && self.send_next().is_err() {
            shut_down(self.stream());
        }
    }

    /// Reads for one turn; whether there may be more.
    pub(super) fn advance(
        &mut self,
        path: &Path,
        outputs: &mut Vec<Output>,
    ) -> Result<bool, QmpError> {
        let began = Instant::now();
        for _ in 0..MAX_EVENTS {
            if self.under_way.is_none() {
                self.lines.begin(MAX_SHORT);
            }
            if let Some(event) = self.events.pop_front() {
                outputs.push(Output::Event(event));
                continue;
            }
            match self.lines.next(began) {
                Ok(line) => self.take(&line, path, outputs)?,
                // What has come by then is not late.
                Err(LineError::Silent) => {
                    let is_late = self.deadline().is_some_and(|deadline| deadline <= began);
                    return if is_late { Err(LineError::Silent.of(path)) } else { Ok(false) };
                }
                Err(error) => return Err(error.of(path)),
            }
            if began.elapsed() >= TURN {
                break;
            }
        }
        Ok(true)
    }

    /// Fails all commands: the one under way with the reason, and those that were not sent.
    pub(super) fn fail(&mut self, error: QmpError, path: &Path, outputs: &mut Vec<Output>) {
        shut_down(self.stream());
        if let Some(under_way) = self.under_way.take() {
            outputs.push(Output::Answer(under_way.reply, Err(error)));
        }
        for command in self.waiting.drain(..) {
            outputs.push(Output::Answer(command.reply, Err(QmpError::Down(path.to_owned()))));
        }
    }

    fn take(
        &mut self,
        line: &[u8],
        path: &Path,
        outputs: &mut Vec<Output>,
    ) -> Result<(), QmpError> {
        let command = self.under_way.as_ref().map_or("no command", |under_way| under_way.name);
        let garbage = || QmpError::Garbage { path: path.to_owned(), command };
        let message: Message = serde_json::from_slice(line).map_err(|_| garbage())?;
        if !message.is_answer() {
            if let Some(under_way) = &mut self.under_way {
                under_way.others += 1;
                if under_way.others > MAX_EVENTS {
                    return Err(LineError::TooMuch.of(path));
                }
            }
            outputs.extend(message.into_event().map(Output::Event));
            return Ok(());
        }
        let under_way = self.under_way.take().ok_or_else(garbage)?;
        outputs.push(Output::Answer(under_way.reply, message.into_result(command)));
        self.send_next().map_err(|error| error.of(path))
    }

    /// Sends the next command. QEMU has read those before it, so that it takes this one at once.
    fn send_next(&mut self) -> Result<(), LineError> {
        let Some(Command { name, text, fd, most, reply }) = self.waiting.pop_front() else {
            return Ok(());
        };
        self.lines.begin(most);
        let now = Instant::now();
        self.under_way = Some(UnderWay { name, deadline: now + LIMIT, others: 0, reply });
        self.lines.send(text.as_bytes(), fd.as_ref().map(AsFd::as_fd), now)
    }
}

/// Ends a connection; the next step reads its end.
pub(super) fn shut_down(socket: &OwnedFd) {
    // It fails only where QEMU was faster.
    let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("lines", &self.lines).finish_non_exhaustive()
    }
}

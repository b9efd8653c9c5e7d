// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The QMP connection to one QEMU. Its users share it, as QEMU serves one client at a time: a VM
//! that is target and introspector has one `Monitor`.
//!
//! It has no thread. The reactor waits for its socket and calls [`Monitor::step`], which reads what
//! has come, for a short time and without waiting, passes events on and answers commands. Two
//! threads may step: the second finds nothing to do. A step is due when the socket is readable, and
//! at the time that the last step returned.
//!
//! Commands come from any thread, one is under way at a time: [`Monitor::send`] returns at once,
//! and `Monitor::lend` gives a [`Qmp`] whose commands wait for their answers, for work that is
//! done step by step on a thread that may wait (never on the one that steps).
//!
//! A lost connection is made anew by a job on another thread ([`Run`]). What was plugged in
//! or stopped over the old connection is still so: users hear [`MonitorEvent::Lost`] and
//! [`MonitorEvent::Found`].

mod connection;
mod end;
mod loan;
mod reconnect;
mod subscriber;
mod users;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use serde_json::Value;
use serde_json::value::RawValue;

use crate::file_id::FileId;
use crate::qmp::line::MAX_SHORT;
use crate::qmp::{Qmp, QmpError};
use connection::{Command, Connection, Output, shut_down};
pub use subscriber::{Counts, MonitorEvent, Subscriber};
pub use users::{Find, Run};
use users::{User, Users};

/// How soon a lost connection is made anew at first; each further attempt waits twice as long.
const AGAIN: Duration = Duration::from_millis(100);

/// How soon to step again after another thread did.
const SOON: Duration = Duration::from_millis(1);

/// The most connections whose closes may block while a new one is made, and how often to look
/// again.
const MAX_CLOSING: usize = 2;
const CLOSING_PAUSE: Duration = Duration::from_secs(1);

/// How often to look whether an attempt to connect has failed.
const LOOK: Duration = Duration::from_millis(250);

/// A connection that is there, or is coming back, as long as it has users. Once the last one has
/// gone it ends with the last loan; a new user has it made anew.
pub struct Monitor {
    path: PathBuf,
    state: Mutex<State>,
    /// Held while events and answers are passed on, which keeps their order.
    passing: Mutex<()>,
    /// Locked before `state`, never while that is locked.
    users: Mutex<Users>,
    /// Each job that closes a connection has it once more.
    closing: Arc<()>,
}

/// When to step again, apart from when the socket is readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// At this time at the latest; `None` for never.
    pub until: Option<Instant>,
    /// There is more to read than one step takes: others come first.
    pub is_behind: bool,
}

#[derive(Debug)]
struct State {
    connection: Option<Connection>,
    /// The file of the last connection's socket.
    file: Option<FileId>,
    counts: Counts,
    /// When to connect again, unless a job does.
    again: Option<Instant>,
    /// The pause before the next attempt but one.
    pause: Duration,
    is_stopped: bool,
}

impl State {
    fn new(connection: Option<Connection>, counts: Counts) -> Self {
        Self {
            file: connection.as_ref().and_then(|connection| connection.file),
            again: connection.is_none().then(Instant::now),
            connection,
            counts,
            pause: AGAIN,
            is_stopped: false,
        }
    }
}

impl Monitor {
    /// Takes a connection over, or makes the first one once there is a user.
    pub fn new(path: PathBuf, qmp: Option<Qmp>) -> Arc<Self> {
        let state = State::new(qmp.and_then(Connection::of), Counts::default());
        Arc::new(Self {
            path,
            state: Mutex::new(state),
            passing: Mutex::default(),
            users: Mutex::default(),
            closing: Arc::default(),
        })
    }

    /// Where QEMU listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a user, who receives events. `find` connects for it where the connection is lost, as a
    /// job of `run`, after pauses of at most `again_at_last`.
    pub fn subscribe(
        &self,
        subscriber: Weak<dyn Subscriber>,
        find: impl Fn() -> Option<Qmp> + Send + Sync + 'static,
        again_at_last: Duration,
        run: Arc<Run>,
    ) {
        let mut users = lock(&self.users);
        users.add(User { subscriber, find: Arc::new(find), again_at_last, run });
        // Under the same lock as the end that another user's leaving may have brought.
        self.revive(None);
    }

    /// Removes a user. The connection ends with the last one, unless it is lent.
    pub fn unsubscribe(&self, subscriber: &Weak<dyn Subscriber>) {
        self.leave(|users| users.remove(subscriber));
    }

    /// Ends this connection, whose QEMU has answered what makes no sense; a new one is made.
    pub fn reconnect(&self) {
        if let Some(socket) = self.socket() {
            shut_down(&socket);
        }
    }

    /// The socket to wait for, to be read; `None` while there is no connection.
    pub fn socket(&self) -> Option<Arc<OwnedFd>> {
        self.state().connection.as_ref().map(|connection| Arc::clone(connection.stream()))
    }

    /// Whether its socket is this file, and it is of use.
    pub(crate) fn is_of(&self, file: FileId) -> bool {
        let state = self.state();
        state.file == Some(file) && !state.is_stopped
    }

    /// Whether it is of use.
    pub(crate) fn is_active(&self) -> bool {
        !self.state().is_stopped
    }

    /// What has happened as far as it was read.
    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    /// Whether there is a connection.
    pub fn is_up(&self) -> bool {
        self.state().connection.is_some()
    }

    /// Reads what has come, passes it on, and connects again where that is due. Does not wait.
    pub fn step(self: &Arc<Self>) -> Step {
        let now = Instant::now();
        let passing = match self.passing.try_lock() {
            Ok(passing) => passing,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Step { until: Some(now + SOON), is_behind: false };
            }
        };
        let mut outputs = Vec::new();
        let mut state = self.state();
        let (mut is_behind, mut lost) = (false, None);
        if let Some(connection) = &mut state.connection {
            match connection.advance(&self.path, &mut outputs) {
                Ok(more) => is_behind = more,
                Err(error) => lost = self.lose(&mut state, error, &mut outputs),
            }
        }
        let mut is_due = state.again.is_some_and(|again| again <= now) && !state.is_stopped;
        if is_due {
            // The other jobs of this VM are not to wait for those that close.
            is_due = Arc::strong_count(&self.closing) <= MAX_CLOSING + 1;
            state.again = (!is_due).then_some(now + CLOSING_PAUSE);
        }
        drop(state);
        self.pass(outputs);
        drop(passing);
        if let Some(socket) = lost {
            let run = lock(&self.users).run();
            self.close_aside(socket, run);
        }
        if is_due {
            self.connect_again();
        }
        // What was passed on may have sent more.
        Step { until: self.due(), is_behind }
    }

    /// When the next step is due as it is now: a command that was sent since the last step has a
    /// limit.
    pub fn due(&self) -> Option<Instant> {
        let state = self.state();
        match &state.connection {
            Some(connection) => connection.deadline(),
            None if state.is_stopped => None,
            None => Some(state.again.unwrap_or_else(|| Instant::now() + LOOK)),
        }
    }

    /// Sends a command without waiting for its answer, which is short, and which `reply` gets from
    /// the thread that steps.
    pub fn send(
        &self,
        command: &'static str,
        arguments: &Value,
        reply: impl FnOnce(Result<Box<RawValue>, QmpError>) + Send + 'static,
    ) {
        self.put(Command::new(command, arguments, None, MAX_SHORT, Box::new(reply)), None);
    }

    /// Queues a command, for one connection alone where `losses` says so.
    fn put(&self, command: Command, losses: Option<u64>) {
        let mut state = self.state();
        let is_meant = losses.is_none_or(|losses| losses == state.counts.losses);
        match state.connection.as_mut().filter(|_| is_meant) {
            Some(connection) => connection.put(command),
            None => {
                drop(state);
                command.fail(self.down());
            }
        }
    }

    /// Passes events and answers on, in their order.
    fn pass(&self, outputs: Vec<Output>) {
        if outputs.is_empty() {
            return;
        }
        let subscribers: Vec<Arc<dyn Subscriber>> =
            lock(&self.users).all().iter().filter_map(|user| user.subscriber.upgrade()).collect();
        for output in outputs {
            let event = match output {
                Output::Event(event) => {
                    if event.name == "RESET" {
                        self.state().counts.resets += 1;
                    }
                    MonitorEvent::Qmp(event)
                }
                Output::Lost => MonitorEvent::Lost,
                Output::Found => MonitorEvent::Found,
                answer => {
                    answer.answer();
                    continue;
                }
            };
            let counts = self.counts();
            subscribers.iter().for_each(|subscriber| subscriber.notify(&event, counts));
        }
    }

    fn down(&self) -> QmpError {
        QmpError::Down(self.path.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Nothing here panics while it holds a lock; were something to, what it left is as good as before.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests;

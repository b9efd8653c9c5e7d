// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The standing QMP connection to an introspector's QEMU.
//!
//! Commands come from any thread, one at a time. A thread of its own takes the events that come in
//! between, and connects again when the connection has failed: devices that were plugged over the
//! old one are still there.
//!
//! The lock on the connection is held for one command, or for one turn of events, however much QEMU
//! sends. Commands go before events, and [`Monitor::stop`] does not need the lock.

mod thread;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvmmem_proto::limit::RateLimit;
use kvmmem_qemu::qmp::{AddedFd, Qmp, QmpError, QmpEvent};
use rustix::event::EventfdFlags;
use serde_json::Value;

pub(super) use thread::identity;

/// How long a QEMU may take to plug something: it may be busy with its guest.
const LIMIT: Duration = Duration::from_secs(2);

/// A guest can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(2);

/// A connection that is there, or is coming back.
#[derive(Debug)]
pub(super) struct Monitor {
    path: PathBuf,
    /// The process that listens, be it QEMU or what has handed it the socket; another one is
    /// another QEMU.
    listener: Option<u32>,
    identity: Vec<Value>,
    /// Taken before `board`.
    qmp: Mutex<Option<Qmp>>,
    board: Mutex<Board>,
    /// Signalled when the board has changed.
    changed: Condvar,
    /// Written to, it ends the thread.
    stop: OwnedFd,
}

/// What is known by events.
#[derive(Debug, Default)]
struct Board {
    /// The connection, to shut it down without the lock.
    socket: Option<Arc<OwnedFd>>,
    /// How many commands have the connection or wait for it.
    commands: usize,
    /// Devices of ours, and whether they have been deleted.
    devices: HashMap<String, bool>,
    news: News,
    /// Whether there is no connection.
    is_down: bool,
    stopped: bool,
}

/// How often something has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// The VM was reset.
    pub(super) resets: u64,
    /// A device of ours was deleted.
    pub(super) deletions: u64,
    /// The connection was lost.
    pub(super) losses: u64,
    /// It is there again.
    pub(super) returns: u64,
    /// Somebody has something to be done.
    pub(super) nudges: u64,
}

/// Why QEMU did not do something.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The connection has failed before.
    #[error("QEMU's QMP socket {0} does not answer")]
    Down(PathBuf),
    /// It refused, or the connection failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

impl MonitorError {
    /// Whether QEMU has said no, so that nothing has changed there.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Qmp(error) if error.is_refusal())
    }

    /// Whether QEMU's words for the refusal contain a text.
    pub(super) fn says(&self, words: &str) -> bool {
        matches!(self, Self::Qmp(QmpError::Refused { description, .. }) if description.contains(words))
    }
}

impl Monitor {
    /// Takes a connection over, and starts the thread; `identity` is what [`identity`] has
    /// returned.
    pub(super) fn start(qmp: Qmp, identity: Vec<Value>) -> std::io::Result<Arc<Self>> {
        let board = Board { socket: Some(share(&qmp)?), ..Board::default() };
        let monitor = Arc::new(Self {
            path: qmp.path().to_owned(),
            listener: qmp.listener(),
            identity,
            qmp: Mutex::new(Some(qmp)),
            board: Mutex::new(board),
            changed: Condvar::new(),
            stop: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let listener = Arc::clone(&monitor);
        std::thread::Builder::new().name("qmp-events".into()).spawn(move || listener.run())?;
        Ok(monitor)
    }

    /// Shuts the connection down and ends the thread; a command under way fails.
    pub(super) fn stop(&self) {
        let mut board = self.board();
        board.stopped = true;
        let socket = board.socket.take();
        drop(board);
        if let Some(socket) = socket {
            // It fails only where QEMU was faster.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
        // It fails only where the counter is full.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        self.changed.notify_all();
    }

    /// Carries out a command.
    pub(super) fn execute(
        &self,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, MonitorError> {
        self.with(|qmp| qmp.execute(command, arguments))
    }

    /// Hands a file to QEMU.
    pub(super) fn add_fd(&self, file: BorrowedFd<'_>) -> Result<AddedFd, MonitorError> {
        self.with(|qmp| qmp.add_fd(file, None))
    }

    /// Takes note of a device that is about to be plugged.
    pub(super) fn watch(&self, device: &str) {
        self.board().devices.insert(device.to_owned(), false);
    }

    /// Forgets a device that is not there any more.
    pub(super) fn forget(&self, device: &str) {
        self.board().devices.remove(device);
    }

    /// Whether a device was deleted, or was never there.
    pub(super) fn is_deleted(&self, device: &str) -> bool {
        self.board().devices.get(device).copied().unwrap_or(true)
    }

    /// Waits until all of these devices are deleted; `false` where some are not in time, or the
    /// connection fails.
    pub(super) fn wait_deleted(&self, devices: &[String], deadline: Instant) -> bool {
        let mut board = self.board();
        loop {
            let gone = |device: &String| board.devices.get(device).copied().unwrap_or(true);
            if devices.iter().all(gone) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || board.is_down || board.stopped {
                return false;
            }
            board =
                self.changed.wait_timeout(board, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until QEMU answers or the monitor is stopped, for some time; whether there is nothing
    /// more to wait for.
    pub(super) fn wait_up(&self, timeout: Duration) -> bool {
        let is_down = |board: &mut Board| board.is_down && !board.stopped;
        let waited = self.changed.wait_timeout_while(self.board(), timeout, is_down);
        !is_down(&mut waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Waits until something happens that is not in `known`, or for some time; `None` once the
    /// monitor is stopped.
    pub(super) fn wait_news(&self, known: News, timeout: Option<Duration>) -> Option<News> {
        let is_old = |board: &mut Board| !board.stopped && board.news == known;
        let board = self.board();
        let board = match timeout {
            Some(timeout) => {
                let waited = self.changed.wait_timeout_while(board, timeout, is_old);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.changed.wait_while(board, is_old).unwrap_or_else(PoisonError::into_inner),
        };
        (!board.stopped).then_some(board.news)
    }

    /// Wakes whoever waits for news.
    pub(super) fn nudge(&self) {
        self.board().news.nudges += 1;
        self.changed.notify_all();
    }

    /// How often things have happened, as far as is known.
    pub(super) fn news(&self) -> News {
        self.board().news
    }

    fn with<T>(
        &self,
        ask: impl FnOnce(&mut Qmp) -> Result<T, QmpError>,
    ) -> Result<T, MonitorError> {
        let _command = Command::begin(self);
        let mut slot = self.slot();
        let qmp = slot.as_mut().filter(|_| !self.board().stopped);
        let qmp = qmp.ok_or_else(|| MonitorError::Down(self.path.clone()))?;
        let answer = ask(qmp);
        let failed = answer.as_ref().is_err_and(|error| !error.is_refusal());
        if failed {
            self.lose(&mut slot);
        } else {
            self.take_events(&mut slot);
        }
        drop(slot);
        Ok(answer?)
    }

    /// Takes one turn of the events that there are; whether there may be more.
    fn take_events(&self, slot: &mut Option<Qmp>) -> bool {
        let Some(qmp) = slot else { return false };
        match qmp.take_events(|event| self.take(&event)) {
            Ok(more) => more,
            Err(error) => {
                self.warn(&error);
                self.lose(slot);
                false
            }
        }
    }

    fn take(&self, event: &QmpEvent) {
        let mut board = self.board();
        match event.name.as_str() {
            "DEVICE_DELETED" => {
                // Parts of devices have no id, and other people's are not of interest.
                let Some(is_deleted) =
                    event.device.as_ref().and_then(|device| board.devices.get_mut(device))
                else {
                    return;
                };
                *is_deleted = true;
                board.news.deletions += 1;
            }
            "RESET" => board.news.resets += 1,
            _ => return,
        }
        drop(board);
        self.changed.notify_all();
    }

    fn lose(&self, slot: &mut Option<Qmp>) {
        // Whoever waits for it to be readable wakes.
        if let Some(qmp) = slot.take() {
            let _ = rustix::net::shutdown(qmp.as_fd(), rustix::net::Shutdown::Both);
        }
        let mut board = self.board();
        board.socket = None;
        board.news.losses += 1;
        board.is_down = true;
        drop(board);
        self.changed.notify_all();
    }

    fn warn(&self, error: &QmpError) {
        let is_wanted = !self.board().stopped;
        if let Some(suppressed) = WARNINGS.allow(Instant::now()).filter(|_| is_wanted) {
            let error: &dyn std::error::Error = error;
            tracing::warn!(path = %self.path.display(), suppressed, error, "an introspector's QEMU does not answer");
        }
    }

    fn slot(&self) -> MutexGuard<'_, Option<Qmp>> {
        self.qmp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A command that has the connection or waits for it, until this is dropped.
struct Command<'a>(&'a Monitor);

impl<'a> Command<'a> {
    fn begin(monitor: &'a Monitor) -> Self {
        monitor.board().commands += 1;
        Self(monitor)
    }
}

impl Drop for Command<'_> {
    fn drop(&mut self) {
        let mut board = self.0.board();
        board.commands -= 1;
        let is_last = board.commands == 0;
        drop(board);
        if is_last {
            self.0.changed.notify_all();
        }
    }
}

/// The socket of a connection, for others.
fn share(qmp: &Qmp) -> std::io::Result<Arc<OwnedFd>> {
    Ok(Arc::new(rustix::io::fcntl_dupfd_cloexec(qmp, 0)?))
}

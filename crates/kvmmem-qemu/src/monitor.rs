// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Listens to a QEMU's monitor, on a thread of its own: one that hangs, floods or lies delays no
//! other VM. The thread also passes on [`Questions`] of the broker's clients.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_proto::limit::RateLimit;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::pause::Stopped;
use super::questions::{Question, Questions, Queue};
use crate::qmp::{Qmp, QmpError};

/// How often QEMU is asked for its status and memory size, also while it floods events.
const IDLE: Duration = Duration::from_secs(10);

/// How often it is asked whether a migration is over.
const MIGRATING: Duration = Duration::from_millis(50);

/// How long what it tells is gathered before more is listened to.
const GATHER: Duration = Duration::from_millis(50);

/// How soon a lost connection is made anew, and the longest pause between two attempts.
const AGAIN: Duration = Duration::from_millis(250);
const AGAIN_AT_LAST: Duration = Duration::from_secs(60);

/// Virtual memory of the thread's stack, bytes; next to none of it is ever touched.
const STACK: usize = 256 * 1024;

/// A QEMU can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(2);

/// A monitor that is listened to, until this is dropped.
#[derive(Debug)]
pub struct Monitor {
    stop: Arc<OwnedFd>,
    questions: Questions,
}

/// A monitor's socket.
#[derive(Debug)]
pub struct Socket {
    /// Where it is.
    pub path: PathBuf,
    /// The process that listened when the VM was added: the VMM, or what has handed it the socket.
    /// `None` where it is not known.
    pub listener: Option<u32>,
    /// The connection, where there is one.
    pub qmp: Option<Qmp>,
}

impl Socket {
    /// The one of a connection, without it.
    pub fn of(qmp: &Qmp) -> Self {
        Self { path: qmp.path().to_owned(), listener: qmp.listener(), qmp: None }
    }
}

impl From<Qmp> for Socket {
    fn from(qmp: Qmp) -> Self {
        let socket = Self::of(&qmp);
        Self { qmp: Some(qmp), ..socket }
    }
}

/// What a monitor has told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// The guest was reset.
    Reset,
    /// Memory may have been plugged in or out, or the connection is a new one.
    Memory,
    /// The VM has migrated: this QEMU does not run it any more.
    Left,
}

/// What is done about news.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Listen on.
    Listen,
    /// Connect anew.
    Reconnect,
    /// The VM is no more listened to.
    Stop,
}

/// What QEMU has told since the last time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Heard {
    reset: bool,
    memory: bool,
    stop: bool,
    /// It may have sent more already.
    more: bool,
}

impl Monitor {
    /// Receives the events of a monitor. `tell` gets each change; `find` connects at first, and
    /// again after a lost connection. A pause that no client has asked for again for `silence`
    /// ends.
    ///
    /// # Errors
    /// Where there are no file descriptors or threads left.
    pub fn start(
        qmp: Option<Qmp>,
        find: impl Fn() -> Option<Qmp> + Send + 'static,
        tell: impl FnMut(&mut Qmp, News) -> Next + Send + 'static,
        silence: Duration,
    ) -> std::io::Result<Self> {
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stop = Arc::new(stop);
        let queue = Queue::new()?;
        let questions = Questions::new(Arc::new(queue.clone()));
        let mut listener =
            Listener { stop: Arc::clone(&stop), queue, stopped: Stopped::new(silence), find, tell };
        let thread = std::thread::Builder::new().name("qmp-monitor".into()).stack_size(STACK);
        thread.spawn(move || listener.run(qmp))?;
        Ok(Self { stop, questions })
    }

    /// What the monitor can be asked.
    pub fn questions(&self) -> &Questions {
        &self.questions
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It fails only where the counter is at its end, and then the thread wakes as well.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

struct Listener<F, T> {
    stop: Arc<OwnedFd>,
    queue: Queue,
    /// The pause of the VM, where there is one.
    stopped: Stopped,
    find: F,
    tell: T,
}

impl<F: Fn() -> Option<Qmp>, T: FnMut(&mut Qmp, News) -> Next> Listener<F, T> {
    fn run(&mut self, connection: Option<Qmp>) {
        self.listen_on(connection);
        // Callers that still wait for an answer get an error.
        self.queue.close();
    }

    fn listen_on(&mut self, mut connection: Option<Qmp>) {
        loop {
            let Some(mut qmp) = connection.take().or_else(|| self.connect()) else { return };
            self.stopped.reconnected(&mut qmp);
            let listened = self.listen(&mut qmp);
            self.stopped.end(&mut qmp);
            match listened {
                Ok(Next::Stop) => return,
                Ok(_) => {}
                Err(error) if self.is_stopped(GATHER) => {
                    tracing::debug!(%error, "the QMP connection has ended with its QEMU");
                    return;
                }
                Err(error) => {
                    if let Some(suppressed) = WARNINGS.allow(Instant::now()) {
                        tracing::warn!(
                            suppressed, %error, "a QMP connection is lost; it is made anew where possible"
                        );
                    }
                }
            }
        }
    }

    /// Listens until told otherwise, or until the connection is lost.
    fn listen(&mut self, qmp: &mut Qmp) -> Result<Next, QmpError> {
        // The size is asked for before the layout, so that memory which is plugged in between is
        // noticed below.
        let mut memory = qmp.memory_size()?;
        match (self.tell)(qmp, News::Memory) {
            Next::Listen => {}
            next => return Ok(next),
        }
        let (mut is_due, mut asked) = (true, Instant::now());
        let mut next = Heard::take(qmp)?;
        loop {
            let mut heard = next;
            if is_due || heard.stop {
                asked = Instant::now();
                // That a DIMM was plugged in is no event.
                let now = qmp.memory_size()?;
                heard.memory |= std::mem::replace(&mut memory, now) != now;
            }
            for news in heard.news() {
                match (self.tell)(qmp, news) {
                    Next::Listen => {}
                    next => return Ok(next),
                }
            }
            // That a migration is over is no event, unless a manager has asked for one.
            let mut is_migrating = false;
            if is_due || heard.stop {
                match qmp.status()?.as_str() {
                    "postmigrate" => return Ok((self.tell)(qmp, News::Left)),
                    status => is_migrating = status == "finish-migrate",
                }
            }
            if self.is_stopped(if heard.is_any() { GATHER } else { Duration::ZERO }) {
                return Ok(Next::Stop);
            }
            for question in self.queue.take() {
                self.answer(qmp, question);
            }
            if qmp.is_broken() {
                return Ok(Next::Reconnect);
            }
            // What came with an answer is not to be waited for.
            next = Heard::take(qmp)?;
            is_due = is_migrating || asked.elapsed() >= IDLE;
            if !next.is_any() {
                is_due |= !self.hears(qmp, if is_migrating { MIGRATING } else { IDLE });
                next = Heard::take(qmp)?;
            }
        }
    }

    fn answer(&mut self, qmp: &mut Qmp, question: Question) {
        // Who has given up waiting needs no answer.
        match question {
            Question::Registers { first, count, reply } => {
                let _ = reply.send(qmp.registers(first, count).map_err(Into::into));
            }
            Question::Pause { holder, is_new, reply } => {
                let _ = reply.send(self.stopped.hold(qmp, holder, is_new));
            }
            Question::Resume { holder, reply } => {
                let _ = reply.send(self.stopped.release(qmp, holder));
            }
        }
    }

    /// A connection, as soon as there is one; `None` once the listener is to end.
    fn connect(&self) -> Option<Qmp> {
        let mut pause = AGAIN;
        loop {
            if self.is_stopped(pause) {
                return None;
            }
            // They are not answered, which their askers see at once.
            drop(self.queue.take());
            if let Some(qmp) = (self.find)() {
                return Some(qmp);
            }
            pause = (pause * 2).min(AGAIN_AT_LAST);
        }
    }

    /// Whether the monitor tells something, or is asked or stopped, within `pause`.
    fn hears(&self, qmp: &Qmp, pause: Duration) -> bool {
        let mut fds = [
            PollFd::new(qmp, PollFlags::IN),
            PollFd::new(&*self.stop, PollFlags::IN),
            PollFd::new(&self.queue, PollFlags::IN),
        ];
        poll(&mut fds, pause);
        fds.iter().any(|fd| !fd.revents().is_empty())
    }

    fn is_stopped(&self, pause: Duration) -> bool {
        let mut fds = [PollFd::new(&*self.stop, PollFlags::IN)];
        poll(&mut fds, pause);
        fds.iter().any(|fd| !fd.revents().is_empty())
    }
}

impl Heard {
    fn take(qmp: &mut Qmp) -> Result<Self, QmpError> {
        let mut heard = Self::default();
        heard.more = qmp.take_events(|event| heard.note(&event.name))?;
        Ok(heard)
    }

    fn note(&mut self, event: &str) {
        match event {
            "RESET" => self.reset = true,
            // The guest has taken a DIMM, or a device has left.
            "ACPI_DEVICE_OST" | "DEVICE_DELETED" | "MEMORY_DEVICE_SIZE_CHANGE" => {
                self.memory = true
            }
            "STOP" => self.stop = true,
            _ => {}
        }
    }

    fn is_any(self) -> bool {
        self != Self::default()
    }

    fn news(self) -> impl Iterator<Item = News> {
        let reset = self.reset.then_some(News::Reset);
        reset.into_iter().chain(self.memory.then_some(News::Memory))
    }
}

fn poll(fds: &mut [PollFd<'_>], pause: Duration) {
    let pause = Timespec::try_from(pause).ok();
    // An interrupted wait is a short one. No other failure is possible but for want of memory.
    let _ = rustix::event::poll(fds, pause.as_ref());
}

#[cfg(test)]
mod tests;

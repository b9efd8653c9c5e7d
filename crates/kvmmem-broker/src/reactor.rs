// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reactor: one thread that waits for everything that only waits, be it a socket, a process or a
//! point in time.
//!
//! A registration waits once, for its file descriptor or its deadline, and then calls its handler
//! on the reactor's thread. [`Reactor::arm`], from the handler or from any other thread, lets it
//! wait again. A handler never blocks: it passes what takes long to [`Workers`], which arm the
//! registration when they are done.
//!
//! A [`Token`] names one registration for ever. An event that was reported for a registration that
//! is removed meanwhile reaches no other one. A handler may be called once more while another
//! thread removes its registration, and sometimes without cause: it finds out by a call that does
//! not wait.
//!
//! [`Workers`]: crate::workers::Workers

mod table;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::ThreadId;
use std::time::Instant;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec};
use rustix::io::Errno;

use table::Table;

use crate::sync::lock;
pub(crate) use table::Token;

/// The most events and the most deadlines of one turn.
const TURN: usize = 64;

/// The thread's stack: handlers do little.
const STACK: usize = 256 << 10;

/// What the kernel reports for the eventfd that wakes the thread. No token has this number.
const WAKE: u64 = u64::MAX;

/// A file descriptor that is readable, or whose peer has closed.
pub(crate) const READABLE: EventFlags = EventFlags::IN.union(EventFlags::RDHUP);

/// A file descriptor that is writable.
pub(crate) const WRITABLE: EventFlags = EventFlags::OUT;

/// Gets the events of a registration.
pub(crate) type Handler = Arc<dyn Fn(&Reactor, Token, Event) + Send + Sync>;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The file descriptor is ready.
    Ready,
    /// The deadline has passed.
    Deadline,
}

/// The thread and what it waits for. Clones are the same reactor. The thread starts with
/// [`Self::start`] or the first registration, and ends with [`Self::end`].
#[derive(Clone, Default)]
pub(crate) struct Reactor(Arc<Shared>);

#[derive(Default)]
struct Shared {
    kernel: OnceLock<Kernel>,
    table: Mutex<Table<Handler>>,
}

struct Kernel {
    epoll: OwnedFd,
    wake: OwnedFd,
    thread: ThreadId,
}

impl Reactor {
    /// Adds a registration, which waits for nothing yet.
    ///
    /// # Errors
    /// Where the thread cannot be started, or has been ended.
    pub(crate) fn insert(&self, handler: Handler) -> io::Result<Token> {
        self.insert_with(|_| handler)
    }

    /// The same, for a handler that keeps its token.
    pub(crate) fn insert_with(&self, handler: impl FnOnce(Token) -> Handler) -> io::Result<Token> {
        self.start()?;
        lock(&self.0.table).insert(handler)
    }

    /// Lets a registration wait once, for what is given here and for nothing else.
    ///
    /// # Errors
    /// Where the kernel cannot wait for the file descriptor. A registration that is removed is no
    /// error.
    pub(crate) fn arm(
        &self,
        token: Token,
        fd: Option<(&Arc<OwnedFd>, EventFlags)>,
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        let Some(kernel) = self.0.kernel.get() else { return Ok(()) };
        // Dropped after the table is unlocked: the last close of a socket may block.
        let former;
        let mut table = lock(&self.0.table);
        let Some(registration) = table.get(token) else { return Ok(()) };
        former = registration.fd.clone();
        let is_same = fd.zip(former.as_ref()).is_some_and(|((new, _), old)| Arc::ptr_eq(new, old));
        if let Some(former) = former.as_ref().filter(|_| !is_same) {
            epoll::delete(&kernel.epoll, former)?;
            registration.fd = None;
        }
        if let Some((fd, flags)) = fd {
            let (data, flags) = (EventData::new_u64(token.0), flags | EventFlags::ONESHOT);
            if is_same {
                epoll::modify(&kernel.epoll, fd, data, flags)?;
            } else {
                epoll::add(&kernel.epoll, fd, data, flags)?;
            }
            registration.fd = Some(Arc::clone(fd));
        }
        registration.is_armed = true;
        let before = std::mem::replace(&mut registration.deadline, deadline);
        table.forget(before, token);
        let Some(deadline) = deadline else { return Ok(()) };
        table.deadlines.insert((deadline, token));
        let is_first = table.deadlines.first() == Some(&(deadline, token));
        if is_first && std::mem::take(&mut table.is_waiting) {
            kernel.wake();
        }
        Ok(())
    }

    /// Ends a registration. Its handler may be running, on the reactor's thread alone.
    pub(crate) fn remove(&self, token: Token) {
        let removed = lock(&self.0.table).remove(token);
        let fd = removed.as_ref().and_then(|registration| registration.fd.as_ref());
        if let Some((fd, kernel)) = fd.zip(self.0.kernel.get()) {
            // It fails only where it is not in the set.
            let _ = epoll::delete(&kernel.epoll, fd);
        }
    }

    /// Ends all registrations and the thread, without waiting for it.
    pub(crate) fn end(&self) {
        let mut table = lock(&self.0.table);
        // What a handler drops may use the reactor.
        let registrations = table.end();
        drop(table);
        drop(registrations);
        if let Some(kernel) = self.0.kernel.get() {
            kernel.wake();
        }
    }

    /// Whether this is the reactor's thread.
    pub(crate) fn is_current(&self) -> bool {
        self.0.kernel.get().is_some_and(|it| it.thread == std::thread::current().id())
    }

    /// Starts the thread, unless it has been started.
    ///
    /// # Errors
    /// Where it cannot be started.
    pub(crate) fn start(&self) -> io::Result<()> {
        // Two threads do not start it at once.
        let _table = lock(&self.0.table);
        if self.0.kernel.get().is_some() {
            return Ok(());
        }
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        let reactor = self.clone();
        let thread = std::thread::Builder::new().name("reactor".into()).stack_size(STACK);
        let (go, is_ready) = std::sync::mpsc::channel::<()>();
        let thread = thread.spawn(move || {
            // The sender goes once the kernel's side is in its place.
            let _ = is_ready.recv();
            reactor.run();
        })?;
        let _ = self.0.kernel.set(Kernel { epoll, wake, thread: thread.thread().id() });
        drop(go);
        Ok(())
    }

    fn run(&self) {
        let Some(kernel) = self.0.kernel.get() else { return };
        let mut events = Vec::with_capacity(TURN);
        loop {
            let mut table = lock(&self.0.table);
            if table.is_ended {
                return;
            }
            table.is_waiting = true;
            let first = table.deadlines.first().map(|(deadline, _)| *deadline);
            drop(table);
            let left = first.map(|first| first.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            events.clear();
            let spare = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&kernel.epoll, spare, left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot wait for sockets and processes any more");
                    return;
                }
            }
            lock(&self.0.table).is_waiting = false;
            for event in &events {
                let token = Token(event.data.u64());
                if token.0 == WAKE {
                    // Whether there was anything to read does not matter.
                    let _ = rustix::io::read(&kernel.wake, &mut [0; 8]);
                } else {
                    let handler = lock(&self.0.table).fire(token);
                    if let Some(handler) = handler {
                        self.call(&handler, token, Event::Ready);
                    }
                }
            }
            let now = Instant::now();
            for _ in 0..TURN {
                let due = lock(&self.0.table).fire_due(now);
                let Some((token, handler)) = due else { break };
                self.call(&handler, token, Event::Deadline);
            }
        }
    }

    /// Calls a handler. What fails in it ends nothing else.
    fn call(&self, handler: &Handler, token: Token, event: Event) {
        let run = AssertUnwindSafe(|| handler(self, token, event));
        if std::panic::catch_unwind(run).is_err() {
            tracing::error!(?token, ?event, "a handler of the reactor has failed");
        }
    }
}

impl Kernel {
    fn wake(&self) {
        // It fails only where the counter is at its end, and then the thread wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor").finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Drives a hook: connects to the tool, serves it, and connects again.
//!
//! A hook costs no thread while it waits for its tool to listen or to send: the reactor waits for
//! that. Each step is a job of the broker's session workers, and ends after a limited amount of
//! work. One worker at a time is at work on a hook. A stream is closed by the worker, before the
//! hook connects again: what the tool has sent and the broker has not received may be a file whose
//! close blocks.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use kvmmem_kvmi::server::{Connection, Limits, Socket, Turn, Workspace};
use kvmmem_limit::RateLimit;
use kvmmem_proto::endpoint::Endpoint;
use rustix::event::epoll::EventFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::Hook;
use super::count::HookSlot;
use crate::audit::Event;
use crate::broker::Broker;
use crate::connect::{connect_to_tool, is_connected};
use crate::core::call_error::in_words;
use crate::introspector::list::Introspectors;
use crate::reactor::{READABLE, Reactor, Token, WRITABLE};
use crate::registry::Vm;
use crate::session::Session;
use crate::sync::lock;
use crate::workers::{Party, Workers};

/// The pause before a tool is tried again: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How long a connection over vsock may take; the kernel gives it 2 s.
const CONNECT_LIMIT: Duration = Duration::from_secs(4);

/// How long a worker waits for a tool's next request before the reactor does. It saves the way over
/// the reactor for a tool that sends one request after the other.
const LINGER: Duration = Duration::from_millis(1);

/// The owner of a path can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(2);

struct Driver {
    broker: Weak<Broker>,
    introspectors: Weak<Introspectors>,
    reactor: Reactor,
    workers: Workers,
    vm: Arc<Vm>,
    hook: Arc<Hook>,
    token: Token,
    work: Mutex<Work>,
    counted: Mutex<Option<HookSlot>>,
}

struct Work {
    stage: Stage,
    /// When the last attempt to connect began.
    began: Instant,
    /// Before the next one.
    pause: Duration,
}

enum Stage {
    Idle,
    Connecting(Arc<OwnedFd>),
    Serving(Arc<OwnedFd>, Box<Connection>),
}

/// What a step waits for.
enum WaitFor {
    /// Nothing: there is more to do, after other hooks.
    Again,
    Socket(Arc<OwnedFd>, EventFlags, Option<Instant>),
    Pause(Duration),
}

/// Starts to drive a hook of `vm`. That ends with the hook.
pub(crate) fn start(
    broker: &Arc<Broker>,
    introspectors: &Arc<Introspectors>,
    (reactor, workers): (&Reactor, &Workers),
    vm: &Arc<Vm>,
    hook: Arc<Hook>,
    counted: HookSlot,
) -> io::Result<()> {
    workers.start()?;
    let now = Instant::now();
    let token = reactor.insert_with(|token| {
        let driver = Arc::new(Driver {
            broker: Arc::downgrade(broker),
            introspectors: Arc::downgrade(introspectors),
            reactor: reactor.clone(),
            workers: workers.clone(),
            vm: Arc::clone(vm),
            hook: Arc::clone(&hook),
            token,
            work: Mutex::new(Work { stage: Stage::Idle, began: now, pause: BACK_OFF.0 }),
            counted: Mutex::new(Some(counted)),
        });
        Arc::new(move |_, _, _| driver.run())
    })?;
    let mut state = hook.lock();
    state.driver = Some((reactor.clone(), token));
    state.nudge();
    Ok(())
}

impl Driver {
    /// What the tool sees of the target.
    fn session<'a>(&'a self, broker: &'a Broker) -> Session<'a> {
        let introspectors = &self.introspectors;
        Session { broker, introspectors, vm: &self.vm, hook: &self.hook }
    }

    /// Has a worker take a step. A hook that was undone while it has no connection ends at once:
    /// its path's file system may not answer for ever.
    fn run(self: &Arc<Self>) {
        let mut state = self.hook.lock();
        let is_unconnected = state.stream.is_none();
        if is_unconnected && state.stopped {
            state.driver = None;
            drop(state);
            return self.end();
        }
        let driver = Arc::clone(self);
        match &self.hook.endpoint {
            // The worker arms the reactor when it is done.
            _ if state.is_busy => {}
            Endpoint::Unix(path) if is_unconnected => {
                let is_taken = self.workers.run_for_path(path, move || driver.step(true));
                let pause = self.work.try_lock().ok().filter(|_| !is_taken);
                // The job may wait for threads that hang. Once a tool listens it need not.
                self.wait_again(pause.map_or(BACK_OFF.1, |mut work| work.pause()));
            }
            _ => self.workers.run(Party::Target(self.vm.id()), move || driver.step(false)),
        }
    }

    /// Takes the next step later.
    fn wait_again(&self, pause: Duration) {
        // It fails only for file descriptors, and takes none.
        let _ = self.reactor.arm(self.token, None, Some(Instant::now() + pause));
    }

    /// Ends the driver. A worker that still looks for the tool's path keeps nothing of it but
    /// memory.
    fn end(&self) {
        let counted = lock(&self.counted).take();
        drop(counted);
        self.reactor.remove(self.token);
    }

    /// Takes a step. One that looks for a path does nothing else: the threads for that are few.
    fn step(self: &Arc<Self>, is_lookup: bool) {
        let Some(broker) = self.broker.upgrade() else { return };
        let mut state = self.hook.lock();
        let is_late = is_lookup && state.stream.is_some();
        if state.is_busy || state.driver.is_none() || is_late {
            return;
        }
        state.is_busy = true;
        let is_stopped = state.stopped;
        // This clone is dropped last, so that the worker closes the stream.
        let mut stream = state.stream.clone();
        drop(state);
        let mut work = lock(&self.work);
        let advance = || self.advance(&broker, &mut work);
        let next = match is_stopped {
            true => WaitFor::Pause(BACK_OFF.1),
            false => std::panic::catch_unwind(AssertUnwindSafe(advance)).unwrap_or_else(|_| {
                tracing::error!(endpoint = %self.hook.endpoint, "a hook's step has failed");
                if self.hook.lock().stream.is_some() {
                    self.disconnected(&broker, &mut work, "failed");
                }
                WaitFor::Pause(work.pause())
            }),
        };
        if self.hook.lock().stream.is_none() && stream.is_some() {
            // The reactor has it too, and must neither close it nor wait for that.
            let _ = self.reactor.arm(self.token, None, None);
            drop(stream.take());
        }
        let mut state = self.hook.lock();
        state.is_busy = false;
        if state.stopped {
            state.driver = None;
            drop(state);
            if matches!(work.stage, Stage::Serving(..)) {
                self.disconnected(&broker, &mut work, "closed");
            }
            return self.end();
        }
        let armed = match next {
            WaitFor::Again => {
                drop(state);
                return self.run();
            }
            WaitFor::Socket(fd, flags, until) => {
                self.reactor.arm(self.token, Some((&fd, flags)), until)
            }
            WaitFor::Pause(pause) => {
                self.reactor.arm(self.token, None, Some(Instant::now() + pause))
            }
        };
        if let Err(error) = armed {
            tracing::error!(%error, endpoint = %self.hook.endpoint, "cannot wait for a tool");
            self.wait_again(BACK_OFF.1);
        }
    }

    /// Does what can be done now.
    fn advance(&self, broker: &Broker, work: &mut Work) -> WaitFor {
        #[cfg(test)]
        tests::fail_if_asked(&self.hook.endpoint);
        let connected = match std::mem::replace(&mut work.stage, Stage::Idle) {
            Stage::Serving(socket, connection) => {
                return self.serve(broker, work, socket, connection);
            }
            Stage::Connecting(socket) => is_connected(&socket).map(|is_done| (socket, is_done)),
            Stage::Idle => {
                work.began = Instant::now();
                connect_to_tool(&self.hook.endpoint, self.hook.owner)
                    .map(|(socket, is_done)| (Arc::new(socket), is_done))
            }
        };
        let until = work.began + CONNECT_LIMIT;
        let opened = match connected {
            Ok((socket, false)) if Instant::now() < until => {
                work.stage = Stage::Connecting(Arc::clone(&socket));
                return WaitFor::Socket(socket, WRITABLE, Some(until));
            }
            Ok((_, false)) => Err(io::ErrorKind::TimedOut.into()),
            Ok((socket, true)) => linger(&socket).map(|()| socket),
            Err(error) => Err(error),
        };
        match opened {
            Ok(socket) if self.hook.open(&socket) => {
                let session = self.session(broker);
                let connection = Box::new(Connection::new(&session, Limits::default()));
                work.stage = Stage::Serving(socket, connection);
                WaitFor::Again
            }
            Ok(_) => WaitFor::Pause(BACK_OFF.0),
            Err(error) => {
                self.report(&error);
                WaitFor::Pause(work.pause())
            }
        }
    }

    fn report(&self, error: &io::Error) {
        let endpoint = &self.hook.endpoint;
        if error.kind() != io::ErrorKind::PermissionDenied {
            tracing::debug!(%endpoint, %error, "no tool listens");
        } else if WARNINGS.allow(Instant::now()).is_some() {
            tracing::warn!(%endpoint, %error, "cannot connect to the tool");
        }
    }

    /// Serves a connected tool as long as it sends requests and no other hook waits.
    fn serve(
        &self,
        broker: &Broker,
        work: &mut Work,
        socket: Arc<OwnedFd>,
        mut connection: Box<Connection>,
    ) -> WaitFor {
        let session = self.session(broker);
        let mut space = Workspace::default();
        let ended = loop {
            let was_greeted = connection.is_greeted();
            let waits = !self.workers.are_wanted();
            let turn =
                connection.turn(&mut Socket { fd: socket.as_fd(), waits }, &session, &mut space);
            if connection.is_greeted() && !was_greeted {
                self.hook.mark_connected();
                let (vm, endpoint) = (&self.vm, &self.hook.endpoint);
                broker.audit().write(Event::Connected { vm, endpoint });
            }
            let next = match turn {
                Ok(Turn::More) if waits && !self.hook.is_stopped() => continue,
                Ok(Turn::More) => WaitFor::Again,
                Ok(Turn::Read(until)) => WaitFor::Socket(Arc::clone(&socket), READABLE, until),
                Ok(Turn::Write(until)) => {
                    WaitFor::Socket(Arc::clone(&socket), WRITABLE, Some(until))
                }
                Ok(Turn::Closed) => break "closed".to_owned(),
                Err(error) => break in_words(&error),
            };
            work.stage = Stage::Serving(socket, connection);
            return next;
        };
        self.disconnected(broker, work, &ended);
        WaitFor::Pause(work.pause())
    }

    fn disconnected(&self, broker: &Broker, work: &mut Work, reason: &str) {
        work.stage = Stage::Idle;
        self.hook.close();
        let (vm, endpoint) = (&self.vm, &self.hook.endpoint);
        broker.audit().write(Event::Disconnected { vm, endpoint, reason });
    }
}

impl Work {
    /// How long to wait before the next attempt to connect.
    fn pause(&mut self) -> Duration {
        let (shortest, longest) = BACK_OFF;
        // A tool that accepts and closes at once is tried as slowly as one that does not listen.
        if self.began.elapsed() > longest {
            self.pause = shortest;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(longest);
        pause
    }
}

/// Lets reads wait a moment.
fn linger(socket: &OwnedFd) -> io::Result<()> {
    rustix::io::ioctl_fionbio(socket, false)?;
    Ok(set_socket_timeout(socket, Timeout::Recv, Some(LINGER))?)
}

#[cfg(test)]
mod tests;

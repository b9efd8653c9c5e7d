// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Drives a hook: connects to the tool, serves it, and connects again.
//!
//! A hook costs no thread while it waits for its tool to listen or to send: the reactor waits for
//! that. Each step is a job of the broker's session workers, and ends after a limited amount of
//! work. One worker at a time is at work on a hook.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvmmem_kvmi::server::{Connection, Limits, Socket, Turn, Workspace};
use kvmmem_proto::limit::RateLimit;
use rustix::event::epoll::EventFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::{Hook, Owner};
use crate::broker::{Broker, Counted, in_words};
use crate::connect::{connect_to_tool, is_connected};
use crate::reactor::{READABLE, Token, WRITABLE};
use crate::registry::Vm;
use crate::session::Session;
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
    workers: Workers,
    vm: Arc<Vm>,
    hook: Arc<Hook>,
    token: Token,
    work: Mutex<Work>,
    _counted: Counted,
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
enum Next {
    /// Other hooks first.
    Again,
    Socket(Arc<OwnedFd>, EventFlags, Option<Instant>),
    Pause(Duration),
}

/// Starts to drive a hook of `vm`. That ends with the hook.
///
/// # Errors
/// Where there are no file descriptors or threads left.
pub(crate) fn start(
    broker: &Arc<Broker>,
    vm: &Arc<Vm>,
    hook: Arc<Hook>,
    counted: Counted,
) -> io::Result<()> {
    let (reactor, workers) = (broker.reactor(), broker.sessions());
    workers.start()?;
    let now = Instant::now();
    let token = reactor.insert_with(|token| {
        let driver = Arc::new(Driver {
            broker: Arc::downgrade(broker),
            workers: workers.clone(),
            vm: Arc::clone(vm),
            hook: Arc::clone(&hook),
            token,
            work: Mutex::new(Work { stage: Stage::Idle, began: now, pause: BACK_OFF.0 }),
            _counted: counted,
        });
        Arc::new(move |_, _, _| driver.run())
    })?;
    let mut state = hook.lock();
    state.driver = Some((reactor.clone(), token));
    state.nudge();
    Ok(())
}

impl Driver {
    /// Has a worker take a step.
    fn run(self: &Arc<Self>) {
        // A file system that does not find a path holds up the user who asked for it alone.
        let party = match self.hook.owner() {
            Owner::Host(asker) if self.hook.lock().stream.is_none() => Party::User(asker.uid),
            Owner::Host(_) | Owner::Vm(_) => Party::Target(self.vm.id()),
        };
        let driver = Arc::clone(self);
        self.workers.run(party, move || driver.step());
    }

    fn step(self: &Arc<Self>) {
        let Some(broker) = self.broker.upgrade() else { return };
        let mut state = self.hook.lock();
        if state.is_busy || state.driver.is_none() {
            return;
        }
        state.is_busy = true;
        let is_stopped = state.stopped;
        drop(state);
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let next =
            if is_stopped { Next::Pause(BACK_OFF.1) } else { self.advance(&broker, &mut work) };
        let mut state = self.hook.lock();
        state.is_busy = false;
        if state.stopped {
            state.driver = None;
            drop(state);
            if matches!(work.stage, Stage::Serving(..)) {
                self.disconnected(&broker, &mut work, "closed");
            }
            broker.reactor().remove(self.token);
            return;
        }
        let armed = match next {
            Next::Again => {
                drop(state);
                return self.run();
            }
            Next::Socket(fd, flags, until) => {
                broker.reactor().arm(self.token, Some((&fd, flags)), until)
            }
            Next::Pause(pause) => {
                broker.reactor().arm(self.token, None, Some(Instant::now() + pause))
            }
        };
        if let Err(error) = armed {
            tracing::error!(%error, endpoint = %self.hook.endpoint, "cannot wait for a tool");
            // It fails for file descriptors alone.
            let later = Some(Instant::now() + BACK_OFF.1);
            let _ = broker.reactor().arm(self.token, None, later);
        }
    }

    /// Does what can be done now.
    fn advance(&self, broker: &Broker, work: &mut Work) -> Next {
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
                return Next::Socket(socket, WRITABLE, Some(until));
            }
            Ok((_, false)) => Err(io::ErrorKind::TimedOut.into()),
            Ok((socket, true)) => linger(&socket).map(|()| socket),
            Err(error) => Err(error),
        };
        match opened {
            Ok(socket) if self.hook.open(&socket) => {
                let session = Session { broker, vm: &self.vm, hook: &self.hook };
                let connection = Box::new(Connection::new(&session, Limits::default()));
                self.serve(broker, work, socket, connection)
            }
            Ok(_) => Next::Pause(BACK_OFF.0),
            Err(error) => {
                self.report(&error);
                work.back_off()
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
    ) -> Next {
        let session = Session { broker, vm: &self.vm, hook: &self.hook };
        let mut space = Workspace::default();
        let ended = loop {
            let was_greeted = connection.is_greeted();
            let waits = !self.workers.are_wanted();
            let turn =
                connection.turn(&mut Socket { fd: socket.as_fd(), waits }, &session, &mut space);
            if connection.is_greeted() && !was_greeted {
                self.hook.mark_connected();
                broker.audit().connected(&self.vm, &self.hook.endpoint);
            }
            let next = match turn {
                Ok(Turn::More) if waits && !self.hook.is_stopped() => continue,
                Ok(Turn::More) => Next::Again,
                Ok(Turn::Read(until)) => Next::Socket(Arc::clone(&socket), READABLE, until),
                Ok(Turn::Write(until)) => Next::Socket(Arc::clone(&socket), WRITABLE, Some(until)),
                Ok(Turn::Closed) => break "closed".to_owned(),
                Err(error) => break in_words(&error),
            };
            work.stage = Stage::Serving(socket, connection);
            return next;
        };
        self.disconnected(broker, work, &ended);
        work.back_off()
    }

    fn disconnected(&self, broker: &Broker, work: &mut Work, reason: &str) {
        work.stage = Stage::Idle;
        self.hook.close();
        broker.audit().disconnected(&self.vm, &self.hook.endpoint, reason);
    }
}

impl Work {
    fn back_off(&mut self) -> Next {
        let (shortest, longest) = BACK_OFF;
        // A tool that accepts and closes at once is no reason to hurry either.
        if self.began.elapsed() > longest {
            self.pause = shortest;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(longest);
        Next::Pause(pause)
    }
}

/// Lets reads wait a moment.
fn linger(socket: &OwnedFd) -> io::Result<()> {
    rustix::io::ioctl_fionbio(socket, false)?;
    Ok(set_socket_timeout(socket, Timeout::Recv, Some(LINGER))?)
}

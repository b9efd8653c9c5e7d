// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One connection: the question, the answer, and then the view.
//!
//! The reactor waits for the question and for the view's end. What asks the introspector, to open
//! or to close a view, is done by workers.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use kvmmem_limit::RateLimit;
use kvmmem_proto::guest::{self, Frame, FrameError, FromTool, MappedBy, ToTool};
use kvmmem_proto::message::{Caller, Refusal};
use kvmmem_proto::timed::TimedSocket;
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv};

use super::connections::{ConnectionLimit, Slot};
use crate::core::call_error::CallError;
use crate::reactor::{self, READABLE, Reactor};
use crate::sync::lock;
use crate::workers::{Party, Workers};

/// How long a tool may take for its question.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// How long a tool may take to read its answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Any VM can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(5);

/// Who opens views: the broker's introspectors, and a stand-in in tests.
pub(crate) trait Views: Send + Sync + 'static {
    /// An open view. Dropping it closes it, which may take a second.
    type View: Send + 'static;

    /// Whether views are opened for the VM at all.
    fn may_ask(&self, cid: u32) -> Result<(), CallError>;

    /// Opens a view; the token is used.
    fn open(
        &self,
        cid: u32,
        token: &Token,
        caller: &Caller,
        read_only: bool,
        mapped_by: MappedBy,
    ) -> Result<Self::View, CallError>;

    /// The broker's number for the view.
    fn number(view: &Self::View) -> u64;

    /// The token by which the guest's driver gives the view to its tool.
    fn ticket(view: &Self::View) -> Token;

    /// Records that the tool has closed the connection, or that its process has ended.
    fn tool_has_closed(view: &Self::View);

    /// Whether the view was revoked, or its target is gone.
    fn has_ended(view: &Self::View) -> bool;

    /// Has the reactor call the handler of `token` once the view has ended, at once if it has.
    fn wake_at_end(view: &Self::View, reactor: &Reactor, token: reactor::Token);
}

/// What the connections share.
#[derive(Debug)]
pub(super) struct Shared<V> {
    pub(super) reactor: Reactor,
    pub(super) workers: Workers,
    pub(super) limit: Arc<ConnectionLimit>,
    pub(super) views: V,
}

/// A tool's connection.
struct Connection<V: Views> {
    shared: Arc<Shared<V>>,
    slot: Slot,
    token: reactor::Token,
    state: Mutex<State<V::View>>,
}

enum State<View> {
    /// The question has not come, or not all of it.
    Asking(Frame, Instant),
    /// A worker has the connection, or it is closed.
    Busy,
    Open(View),
}

/// Serves a tool until it closes, or its view has ended.
///
/// # Errors
/// Where the reactor cannot wait for it.
pub(super) fn serve<V: Views>(shared: &Arc<Shared<V>>, slot: Slot) -> io::Result<()> {
    let until = Instant::now() + ASK_LIMIT;
    let state = Mutex::new(State::Asking(Frame::default(), until));
    let socket = Arc::clone(slot.socket());
    let shared = Arc::clone(shared);
    let reactor = shared.reactor.clone();
    let token = reactor.insert_with(|token| {
        let connection = Arc::new(Connection { shared, slot, token, state });
        Arc::new(move |_, _, _| connection.advance())
    })?;
    reactor.arm(token, Some((&socket, READABLE)), Some(until)).inspect_err(|_| {
        reactor.remove(token);
    })
}

impl<V: Views> Connection<V> {
    /// Does what can be done without waiting.
    fn advance(self: &Arc<Self>) {
        let state = std::mem::replace(&mut *self.lock(), State::Busy);
        match state {
            State::Asking(frame, until) => self.ask(frame, until),
            State::Open(view) => match self.ended(&view) {
                Some(ended) => self.end(view, ended),
                None => self.keep(view),
            },
            State::Busy => {}
        }
    }

    /// Reads what has come of the question.
    fn ask(self: &Arc<Self>, mut frame: Frame, until: Instant) {
        let now = Instant::now();
        match frame.read(&mut TimedSocket::new(self.slot.socket().as_fd(), now)) {
            Ok(Some(question)) => {
                let connection = Arc::clone(self);
                self.run(move || connection.open(question));
            }
            // It has gone without a word.
            Ok(None) => self.close(),
            Err(FrameError::Read(error))
                if error.kind() == io::ErrorKind::TimedOut && now < until =>
            {
                self.wait(State::Asking(frame, until), Some(until));
            }
            Err(error) => {
                // Without what is behind an error: that may repeat parts of the frame.
                let refused = CallError::new(Refusal::Malformed, error);
                refuse(self.slot.socket(), self.slot.cid(), &refused, now);
                self.close();
            }
        }
    }

    /// Opens the view that is asked for, and answers.
    fn open(self: &Arc<Self>, question: FromTool) {
        let FromTool::Open { token, read_only, caller, mapped_by } = question;
        let (socket, cid) = (self.slot.socket(), self.slot.cid());
        match self.shared.views.open(cid, &token, &caller, read_only, mapped_by) {
            Ok(view) => {
                let answer = ToTool::Opened { view: V::number(&view), ticket: V::ticket(&view) };
                let deadline = Instant::now() + ANSWER_LIMIT;
                match guest::write(&mut TimedSocket::new(socket.as_fd(), deadline), &answer) {
                    Ok(()) => self.keep(view),
                    Err(_) => {
                        let ended = self.ended(&view).unwrap_or("its tool does not read");
                        self.end(view, ended);
                    }
                }
            }
            Err(refused) => {
                refuse(socket, cid, &refused, Instant::now() + ANSWER_LIMIT);
                self.close();
            }
        }
    }

    /// Why an open view ends, if it does.
    fn ended(&self, view: &V::View) -> Option<&'static str> {
        let received = recv(self.slot.socket(), &mut [0; 1], RecvFlags::DONTWAIT);
        // An endpoint that is closed has ended the connection itself, and the tool may still have
        // the view's memory.
        if matches!(received, Ok((0, _))) && !self.shared.limit.is_closed() {
            V::tool_has_closed(view);
        }
        if V::has_ended(view) {
            return Some("revoked, or its target has exited");
        }
        match received {
            Err(Errno::AGAIN | Errno::INTR) => None,
            Ok((0, _)) | Err(_) => Some("closed"),
            Ok(_) => Some("its tool spoke out of turn"),
        }
    }

    /// Waits until the tool closes the connection or the view ends.
    fn keep(self: &Arc<Self>, view: V::View) {
        self.wait(State::Open(view), None);
        if let State::Open(view) = &*self.lock() {
            V::wake_at_end(view, &self.shared.reactor, self.token);
        }
    }

    fn end(self: &Arc<Self>, view: V::View, ended: &'static str) {
        let connection = Arc::clone(self);
        self.run(move || {
            let (number, cid) = (V::number(&view), connection.slot.cid());
            // Ahead of the connection, so that a tool that asks again finds the slot free.
            drop(view);
            tracing::debug!(cid, view = number, ended, "a view of a guest ended");
            connection.close();
        });
    }

    fn wait(self: &Arc<Self>, state: State<V::View>, until: Option<Instant>) {
        *self.lock() = state;
        let fd = Some((self.slot.socket(), READABLE));
        if let Err(error) = self.shared.reactor.arm(self.token, fd, until) {
            tracing::warn!(%error, "cannot wait for a tool of a guest");
            let connection = Arc::clone(self);
            self.run(move || {
                let state = std::mem::replace(&mut *connection.lock(), State::Busy);
                drop(state);
                connection.close();
            });
        }
    }

    /// Ends the connection, which has no view.
    fn close(&self) {
        // Others may hold on to the socket for a moment; the connection ends now.
        let _ = rustix::net::shutdown(self.slot.socket(), Shutdown::Both);
        self.shared.reactor.remove(self.token);
    }

    fn run(&self, job: impl FnOnce() + Send + 'static) {
        self.shared.workers.run(Party::Cid(self.slot.cid()), job);
    }

    fn lock(&self) -> MutexGuard<'_, State<V::View>> {
        lock(&self.state)
    }
}

/// Tells a tool that it gets no view.
pub(super) fn refuse(socket: &OwnedFd, cid: u32, refused: &CallError, deadline: Instant) {
    if let Some(suppressed) = WARNINGS.allow(Instant::now()) {
        tracing::warn!(
            cid,
            suppressed,
            reason = refused.message,
            "a VM was refused a view at the guest endpoint"
        );
    }
    let message = ToTool::refused(refused.refusal, &refused.message);
    // One that does not read it does without.
    let _ = guest::write(&mut TimedSocket::new(socket.as_fd(), deadline), &message);
}

#[cfg(test)]
mod tests;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One connection: the question, the answer, and then the view.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use kvmmem_proto::guest::{self, FrameError, FromTool, ToTool};
use kvmmem_proto::limit::RateLimit;
use kvmmem_proto::message::{Caller, Refusal};
use kvmmem_proto::timed::Timed;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv};

use super::connections::Slot;
use crate::broker::Refused;

/// How long a tool may take for its question.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// How long a tool may take to read its answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// How often it is looked whether the view has ended from the broker's side.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Any VM can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(5);

/// Who opens views: the broker's introspectors, and a stand-in in tests.
pub(super) trait Views: Send + Sync + 'static {
    /// An open view. Dropping it closes it, which may take a second.
    type View;

    /// Whether views are opened for the VM at all.
    fn may_ask(&self, cid: u32) -> Result<(), Refused>;

    /// Opens a view; the token is used.
    fn open(
        &self,
        cid: u32,
        token: &Token,
        caller: &Caller,
        read_only: bool,
    ) -> Result<Self::View, Refused>;

    /// The broker's number for the view.
    fn number(view: &Self::View) -> u64;

    /// The token by which the guest's driver gives the view to its tool.
    fn ticket(view: &Self::View) -> Token;

    /// Whether the view has ended without its tool's doing: it was taken back, or its target is
    /// gone.
    fn has_ended(view: &Self::View) -> bool;
}

/// Serves a tool until it closes, or its view has ended.
pub(super) fn serve<V: Views>(views: &V, slot: &Slot) {
    let (socket, cid) = (slot.socket(), slot.cid());
    match ask(views, slot) {
        Ok(Some(view)) => {
            let number = V::number(&view);
            let answered = guest::write(
                &mut Timed::new(socket.as_fd(), Instant::now() + ANSWER_LIMIT),
                &ToTool::Opened { view: number, ticket: V::ticket(&view) },
            );
            let ended = match answered {
                Ok(()) => keep::<V>(&view, socket),
                Err(_) => "its tool does not read",
            };
            // Ahead of the connection, so that a tool that asks again finds the slot free.
            drop(view);
            tracing::debug!(cid, view = number, ended, "a view of a guest ended");
        }
        Ok(None) => {}
        Err(refused) => refuse(socket, cid, &refused, Instant::now() + ANSWER_LIMIT),
    }
    // Others may hold on to the socket for a moment; the connection ends now.
    let _ = rustix::net::shutdown(socket, Shutdown::Both);
}

/// Reads the question and opens the view; `None` where the tool has gone without a word.
fn ask<V: Views>(views: &V, slot: &Slot) -> Result<Option<V::View>, Refused> {
    let mut timed = Timed::new(slot.socket().as_fd(), Instant::now() + ASK_LIMIT);
    // Without what is behind an error: that may repeat parts of the frame.
    let malformed = |error: FrameError| Refused::new(Refusal::Malformed, error);
    match guest::read(&mut timed).map_err(malformed)? {
        Some(FromTool::Open { token, read_only, caller }) => {
            views.open(slot.cid(), &token, &caller, read_only).map(Some)
        }
        None => Ok(None),
    }
}

/// Waits until the tool closes the connection or the view ends; returns which.
fn keep<V: Views>(view: &V::View, socket: &OwnedFd) -> &'static str {
    loop {
        if V::has_ended(view) {
            return "taken back, or its target is gone";
        }
        match poll(&mut [PollFd::new(socket, PollFlags::IN | PollFlags::RDHUP)], Some(&LOOK)) {
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => {}
            Err(_) => return "cannot wait for its tool",
        }
        match recv(socket, &mut [0; 1], RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok((0, _)) | Err(_) => return "closed",
            Ok(_) => return "its tool spoke out of turn",
        }
    }
}

/// Tells a tool that it gets no view.
pub(super) fn refuse(socket: &OwnedFd, cid: u32, refused: &Refused, deadline: Instant) {
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
    let _ = guest::write(&mut Timed::new(socket.as_fd(), deadline), &message);
}

#[cfg(test)]
mod tests;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lets tools in.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_proto::limit::RateLimit;
use kvmmem_proto::message::Refusal;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vsock::VsockListener;

use super::connections::ConnectionLimit;
use super::serve::{Views, refuse, serve};
use crate::broker::Refused;

/// How long to wait when a connection cannot be accepted: the system has no file descriptors or
/// memory left.
const PAUSE: Duration = Duration::from_millis(100);

/// Any VM can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(2);

/// A listening socket: vsock, and a unix socket in tests.
pub(super) trait Accept: AsFd + Send + 'static {
    /// A connection and the context id of the VM that it comes from. Does not wait.
    fn accept(&self) -> io::Result<(OwnedFd, u32)>;
}

impl Accept for VsockListener {
    fn accept(&self) -> io::Result<(OwnedFd, u32)> {
        let (stream, address) = VsockListener::accept(self)?;
        Ok((stream.into(), address.cid()))
    }
}

/// Lets tools in until `stop` becomes readable.
pub(super) fn accept_until<V: Views>(
    stop: BorrowedFd<'_>,
    acceptor: &impl Accept,
    limit: &Arc<ConnectionLimit>,
    views: &Arc<V>,
) {
    loop {
        let listener = acceptor.as_fd();
        let mut fds =
            [PollFd::from_borrowed_fd(stop, PollFlags::IN), PollFd::new(&listener, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => {
                tracing::error!(%error, "the guest endpoint cannot wait for connections and closes");
                return;
            }
        }
        let [stopped, listening] = fds.map(|fd| !fd.revents().is_empty());
        if stopped {
            return;
        }
        if !listening {
            continue;
        }
        match acceptor.accept() {
            Ok((socket, cid)) => admit(Arc::new(socket), cid, limit, views),
            // The tool was gone before it was accepted.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(error) => {
                if WARNINGS.allow(Instant::now()).is_some() {
                    tracing::warn!(%error, "the guest endpoint cannot accept a connection");
                }
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// Starts a thread for a connection, or refuses it without one.
fn admit<V: Views>(socket: Arc<OwnedFd>, cid: u32, limit: &Arc<ConnectionLimit>, views: &Arc<V>) {
    let slot = views.may_ask(cid).and_then(|()| {
        limit.take(cid, &socket).map_err(|error| Refused::new(Refusal::Limit, error))
    });
    let slot = match slot {
        Ok(slot) => slot,
        Err(refused) => {
            // A new connection takes a frame at once, or is not worth waiting for.
            refuse(&socket, cid, &refused, Instant::now());
            return;
        }
    };
    let started = std::thread::Builder::new().name(format!("guest-{cid}")).spawn({
        let views = Arc::clone(views);
        move || serve(&*views, &slot)
    });
    if let Err(error) = started {
        let refused =
            Refused::new(Refusal::Limit, format!("the broker cannot start a thread: {error}"));
        refuse(&socket, cid, &refused, Instant::now());
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Accepts the connections of the guest endpoint.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_limit::RateLimit;
use kvmmem_proto::message::Refusal;
use vsock::VsockListener;

use super::serve::{Shared, Views, refuse, serve};
use crate::core::call_error::CallError;
use crate::reactor::{Handler, READABLE, Token};

/// The most connections that are accepted in one turn of the reactor.
const TURN: usize = 16;

/// How long to wait when a connection cannot be accepted: the system has no file descriptors or
/// memory left.
const PAUSE: Duration = Duration::from_millis(100);

/// Any VM can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(2);

/// A listening socket: vsock, and a unix socket in tests.
pub(super) trait Accept: AsFd + Send + Sync + 'static {
    /// A connection and the context id of the VM that it comes from. Does not wait.
    fn accept(&self) -> io::Result<(OwnedFd, u32)>;
}

impl Accept for VsockListener {
    fn accept(&self) -> io::Result<(OwnedFd, u32)> {
        let (stream, address) = VsockListener::accept(self)?;
        Ok((stream.into(), address.cid()))
    }
}

/// Accepts connections until the registration that is returned is removed.
///
/// # Errors
/// Where the reactor cannot wait for them.
pub(super) fn listen<V: Views>(
    acceptor: impl Accept,
    shared: &Arc<Shared<V>>,
) -> io::Result<Token> {
    let listener = Arc::new(acceptor.as_fd().try_clone_to_owned()?);
    let (fd, connections) = (Arc::clone(&listener), Arc::clone(shared));
    let handler: Handler = Arc::new(move |reactor, token, _| {
        let armed = if accept(&acceptor, &connections) {
            reactor.arm(token, Some((&fd, READABLE)), None)
        } else {
            reactor.arm(token, None, Some(Instant::now() + PAUSE))
        };
        if let Err(error) = armed {
            tracing::error!(%error, "the guest endpoint cannot wait for connections and closes");
        }
    });
    let token = shared.reactor.insert(handler)?;
    shared.reactor.arm(token, Some((&listener, READABLE)), None)?;
    Ok(token)
}

/// Accepts the connections that wait, for one turn; `false` where that is not possible now.
fn accept<V: Views>(acceptor: &impl Accept, shared: &Arc<Shared<V>>) -> bool {
    for _ in 0..TURN {
        match acceptor.accept() {
            Ok((socket, cid)) => admit(&Arc::new(socket), cid, shared),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            // The tool was gone before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                if WARNINGS.allow(Instant::now()).is_some() {
                    tracing::warn!(%error, "the guest endpoint cannot accept a connection");
                }
                return false;
            }
        }
    }
    true
}

/// Serves a connection, or refuses it.
fn admit<V: Views>(socket: &Arc<OwnedFd>, cid: u32, shared: &Arc<Shared<V>>) {
    let limit = |error: &dyn std::error::Error| CallError::new(Refusal::Limit, error);
    let served = shared.views.may_ask(cid).and_then(|()| {
        let slot = shared.limit.take(cid, socket).map_err(|error| limit(&error))?;
        serve(shared, slot).map_err(|error| limit(&error))
    });
    if let Err(refused) = served {
        // A new connection takes a frame at once, or is not worth waiting for.
        refuse(socket, cid, &refused, Instant::now());
    }
}

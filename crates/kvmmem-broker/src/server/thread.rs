// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The threads of connections. A connection that is idle has none: it waits at the reactor, which
//! starts a thread for it once its peer has sent something.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvmmem_limit::RateLimit;

use super::connections::ConnectionSlot;
use crate::connection::Connection;
use crate::reactor::{READABLE, Reactor, Token};
use crate::sync::lock;

/// A connection's stack: enough for the deepest packet that the parser takes, and so small that the
/// kernel backs none by a huge page.
const STACK: usize = 512 << 10;

/// When to try again to start a thread.
const RETRY: Duration = Duration::from_millis(100);

static WARNINGS: RateLimit = RateLimit::new(2);

/// A connection that is idle. The slot is given back last.
struct Idle {
    connection: Connection,
    slot: ConnectionSlot,
}

/// Serves a new connection.
///
/// # Errors
/// Where no thread can be started.
pub(super) fn start(slot: ConnectionSlot) -> io::Result<()> {
    spawn(move || {
        let connection = Connection::new(&slot.shared.service, &slot.peer);
        serve(connection, slot);
    })
}

fn spawn(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("peer".into()).stack_size(STACK).spawn(run).map(drop)
}

/// Serves a connection until it ends or is idle.
fn serve(mut connection: Connection, mut slot: ConnectionSlot) {
    while let Some(idle) = connection.serve() {
        match wait(Idle { connection: idle, slot }) {
            Ok(()) => return,
            // It keeps its thread.
            Err(idle) => Idle { connection, slot } = idle,
        }
    }
}

/// Lets an idle connection wait at the reactor.
///
/// # Errors
/// The connection, where the reactor cannot wait for it.
fn wait(idle: Idle) -> Result<(), Idle> {
    let Some(socket) = idle.slot.peer.socket().map(|socket| Arc::clone(socket.descriptor())) else {
        return Err(idle);
    };
    let reactor = idle.slot.shared.service.reactor().clone();
    let place = Arc::new(Mutex::new(Some(idle)));
    let waiting = Arc::clone(&place);
    let token =
        reactor.insert(Arc::new(move |reactor: &Reactor, token, _| wake(reactor, token, &waiting)));
    let is_waiting = token.and_then(|token| {
        reactor.arm(token, Some((&socket, READABLE)), None).inspect_err(|_| reactor.remove(token))
    });
    if is_waiting.is_ok() {
        return Ok(());
    }
    lock(&place).take().map_or(Ok(()), Err)
}

/// Starts a thread for a connection whose peer has sent something, or has closed.
fn wake(reactor: &Reactor, token: Token, place: &Arc<Mutex<Option<Idle>>>) {
    // The reactor is not to be the last owner of the socket: closing it may block.
    let _ = reactor.arm(token, None, None);
    let taken = Arc::clone(place);
    let started = spawn(move || {
        let idle = lock(&taken).take();
        if let Some(Idle { connection, slot }) = idle {
            serve(connection, slot);
        }
    });
    let Err(error) = started else { return reactor.remove(token) };
    if WARNINGS.allow(Instant::now()).is_some() {
        tracing::warn!(%error, "cannot start a thread for a connection yet");
    }
    let _ = reactor.arm(token, None, Some(Instant::now() + RETRY));
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The threads of connections. A connection that is idle has none: it waits at the reactor, which
//! starts a thread for it once its peer has sent something. So it is owned by one thread, or by one
//! registration.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvmmem_limit::RateLimit;
use kvmmem_proto::packet::PacketSocket;

use super::connections::ConnectionSlot;
use crate::connection::Connection;
use crate::reactor::{READABLE, Reactor, Token};
use crate::sync::lock;

/// A connection's stack: enough for the deepest packet that the parser takes, and so small that the
/// kernel backs none by a huge page.
const STACK: usize = 512 << 10;

/// When to try again to start a thread.
const RETRY: Duration = Duration::from_millis(500);

static WARNINGS: RateLimit = RateLimit::new(2);

/// A connection that is idle. The slot is given back last.
struct Idle {
    connection: Connection,
    slot: ConnectionSlot,
}

/// Serves a new connection.
///
/// # Errors
/// The slot, where no thread can be started.
pub(super) fn start(slot: ConnectionSlot) -> Result<(), (io::Error, ConnectionSlot)> {
    let slot = Arc::new(Mutex::new(Some(slot)));
    let started = spawn(&slot, |slot| {
        let connection = Connection::new(slot.service(), slot.peer());
        serve(connection, slot);
    });
    started.or_else(|error| lock(&slot).take().map_or(Ok(()), |slot| Err((error, slot))))
}

/// Starts a thread that takes what is `owned`; it stays there where none can be started.
fn spawn<T: Send + 'static>(owned: &Arc<Mutex<Option<T>>>, run: fn(T)) -> io::Result<()> {
    let owned = Arc::clone(owned);
    let thread = std::thread::Builder::new().name("peer".into()).stack_size(STACK);
    let run = move || {
        let taken = lock(&owned).take();
        taken.into_iter().for_each(run);
    };
    thread.spawn(run).map(drop)
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
    slot.close();
}

/// Lets an idle connection wait at the reactor.
///
/// # Errors
/// The connection, where the reactor cannot wait for it.
fn wait(idle: Idle) -> Result<(), Idle> {
    let reactor = idle.slot.service().reactor().clone();
    let parked = Arc::new(Mutex::new(Some(idle)));
    let waiting = Arc::clone(&parked);
    let wake = Arc::new(move |reactor: &Reactor, token, _| wake(reactor, token, &waiting));
    // Until the lock is released the connection is served by no thread.
    let mut parked = lock(&parked);
    let arm = |socket: &PacketSocket| {
        let arm = |token| {
            let armed = reactor.arm(token, Some((socket.descriptor(), READABLE)), None);
            armed.inspect_err(|_| reactor.remove(token))
        };
        reactor.insert(wake).and_then(arm).is_ok()
    };
    let is_waiting = parked.as_ref().and_then(|idle| idle.slot.peer().with_socket(arm));
    if is_waiting.unwrap_or(false) { Ok(()) } else { parked.take().map_or(Ok(()), Err) }
}

/// Starts a thread for a connection whose peer has sent something, or has closed.
fn wake(reactor: &Reactor, token: Token, parked: &Arc<Mutex<Option<Idle>>>) {
    // The reactor is not to be the last owner of the socket: closing it may block.
    let _ = reactor.arm(token, None, None);
    let started = spawn(parked, |Idle { connection, slot }| serve(connection, slot));
    let Err(error) = started else { return reactor.remove(token) };
    if WARNINGS.allow(Instant::now()).is_some() {
        tracing::warn!(%error, "cannot start a thread for a connection yet");
    }
    let _ = reactor.arm(token, None, Some(Instant::now() + RETRY));
}

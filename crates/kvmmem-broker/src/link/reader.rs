// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread of a [`super::VmmLink`]: registers, takes pushes and answers, registers again.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{LinkError, Shared, State, Target};
use crate::map::MemoryMap;
use crate::packet::{PacketBuffer, PacketError, PacketSocket, Wait};
use crate::wire::{Call, FromBroker, Request};

/// How long the broker may take to answer a registration, or to take a packet.
const REGISTER_LIMIT: Duration = Duration::from_secs(5);

/// How long after a token's use the broker is told of it, at most.
const TELL_USED_AFTER: Duration = Duration::from_millis(20);

/// How long to wait before the broker is tried again: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A registered connection.
pub(super) struct Connection {
    socket: Arc<PacketSocket>,
    buffer: PacketBuffer,
}

/// Connects and registers; the connection is the link's from then on.
pub(super) fn register(shared: &Shared) -> Result<Connection, LinkError> {
    let socket = PacketSocket::connect(&shared.path, REGISTER_LIMIT)
        .map_err(|source| LinkError::Connect { path: shared.path.clone(), source })?;
    let call = Call::Register(shared.registration.clone());
    let ram = shared.ram.as_ref().map(AsFd::as_fd);
    // A broker that is full closes at once, having said why: what it said is still there to be read.
    let sent = socket.send(&Request { id: 0, call }, ram, Wait::Limited);
    socket.limit_receive(Some(REGISTER_LIMIT)).map_err(LinkError::Packet)?;
    let mut buffer = PacketBuffer::default();
    loop {
        match socket.receive(&mut buffer).map_err(LinkError::Packet)? {
            Some((FromBroker::Answer { .. }, _)) => break,
            Some((FromBroker::Refused { refusal, message, .. }, _)) => {
                return Err(LinkError::Refused { refusal, message });
            }
            Some(_) => {}
            None => return Err(sent.err().map_or(LinkError::NoAnswer, LinkError::Packet)),
        }
    }
    socket.limit_receive(None).map_err(LinkError::Packet)?;
    let socket = Arc::new(socket);
    let mut state = shared.lock();
    // A link that was dropped meanwhile will not shut this socket down.
    if state.stopped {
        return Err(LinkError::NoAnswer);
    }
    state.socket = Some(Arc::clone(&socket));
    drop(state);
    Ok(Connection { socket, buffer })
}

/// Reads until the link is dropped.
pub(super) fn run(shared: &Shared, mut connection: Connection) {
    loop {
        let ended = read(shared, &mut connection);
        let mut state = shared.lock();
        // A dropped link has taken the socket away and shut it down.
        if state.stopped {
            return;
        }
        state.socket = None;
        state.cache.clear();
        state.used.clear();
        state.waiting.clear();
        drop(state);
        shared.changed.notify_all();
        match ended {
            Ok(()) => tracing::warn!(path = %shared.path.display(), "the broker closed the connection"),
            Err(error) => tracing::warn!(
                path = %shared.path.display(),
                error = &error as &dyn std::error::Error,
                "the connection to the broker failed"
            ),
        }
        drop(connection);
        match register_again(shared) {
            Some(again) => connection = again,
            None => return,
        }
    }
}

/// Takes packets until the connection ends, and tells the broker of used tokens in between: here, so that the vCPU that
/// used one need not.
fn read(shared: &Shared, connection: &mut Connection) -> Result<(), LinkError> {
    let Connection { socket, buffer } = connection;
    let mut is_limited = false;
    loop {
        let may_be_used = {
            let state = shared.lock();
            state.cache.has_grants(Instant::now()) || !state.used.is_empty()
        };
        if may_be_used != is_limited {
            socket.limit_receive(may_be_used.then_some(TELL_USED_AFTER)).map_err(LinkError::Packet)?;
            is_limited = may_be_used;
        }
        match socket.receive(buffer) {
            Ok(Some((message, fd))) => {
                take(&mut shared.lock(), message, fd)?;
                shared.changed.notify_all();
            }
            Ok(None) => return Ok(()),
            Err(PacketError::Receive(Errno::AGAIN)) if is_limited => {}
            Err(error) => return Err(LinkError::Packet(error)),
        }
        tell_used(shared, socket);
    }
}

/// Tells the broker which pushed tokens were used. Its count of outstanding tokens and its audit log depend on it, so a
/// broker that does not read is not waited for.
fn tell_used(shared: &Shared, socket: &PacketSocket) {
    let used = std::mem::take(&mut shared.lock().used);
    for token in used {
        let _ = socket.send(&Request { id: 0, call: Call::Used { token } }, None, Wait::No);
    }
}

/// Takes one message in.
fn take(state: &mut State, message: FromBroker, fd: Option<OwnedFd>) -> Result<(), LinkError> {
    let (id, answer) = match message {
        FromBroker::Target { id, name, uuid, regions } => {
            let map = MemoryMap::new(regions).map_err(LinkError::Map)?;
            let ram = fd.ok_or(LinkError::NoAnswer)?;
            state.cache.insert_target(Target { id, name, uuid, map, ram });
            return Ok(());
        }
        FromBroker::Granted { token, target, expires_in_ms } => {
            let lifetime = Duration::from_millis(expires_in_ms);
            state.cache.grant(Instant::now(), token, target, lifetime);
            return Ok(());
        }
        FromBroker::Gone { target } => {
            state.cache.forget(target);
            return Ok(());
        }
        FromBroker::Answer { id, answer } => (id, Ok(answer)),
        FromBroker::Refused { id, refusal, .. } => (id, Err(refusal)),
    };
    // Whoever asked may have given up; then nobody takes the answer.
    if let Some(waiting) = state.waiting.get_mut(&id) {
        *waiting = Some(answer);
    }
    Ok(())
}

/// Registers again, with growing pauses; `None` when the link is dropped.
fn register_again(shared: &Shared) -> Option<Connection> {
    let (mut pause, most) = BACK_OFF;
    let mut last_failure = String::new();
    loop {
        let state = shared.lock();
        let (state, _) = shared
            .changed
            .wait_timeout_while(state, pause, |state| !state.stopped)
            .unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            return None;
        }
        drop(state);
        match register(shared) {
            Ok(connection) => {
                tracing::info!(path = %shared.path.display(), "registered with the broker again");
                return Some(connection);
            }
            Err(error) => {
                // Said once for each new reason, not at each try.
                let failure = reason(&error);
                if failure != last_failure {
                    tracing::warn!(%failure, "cannot register with the broker; trying on");
                    last_failure = failure;
                }
            }
        }
        pause = (pause * 2).min(most);
    }
}

fn reason(error: &LinkError) -> String {
    match error {
        LinkError::Connect { source: PacketError::Connect(errno), .. } => format!("{error}: {errno}"),
        _ => error.to_string(),
    }
}

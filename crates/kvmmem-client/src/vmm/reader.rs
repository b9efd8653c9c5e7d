// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread of a [`super::VmmLink`]: registers, takes pushes and answers, registers again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use kvmmem_limit::RateLimit;
use kvmmem_proto::client::{self, ClientError};
use kvmmem_proto::map::MemoryMap;
use kvmmem_proto::message::{Answer, Call, Change, FromBroker, Request, Unusable, ViewCounters};
use kvmmem_proto::packet::{PacketBuffer, PacketError, PacketSocket};
use rustix::io::Errno;

use super::error::RedeemError;
use super::events::Event;
use super::state::{Shared, State};
use super::target::Target;
use super::views::Views;

/// How long after a token's use the broker is told of it, at most; and how soon it is tried again.
const TELL_AFTER: Duration = Duration::from_millis(20);

/// How long to wait before the broker is tried again: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A guest can cause these.
static WARNINGS: RateLimit = RateLimit::new(1);

/// A registered connection.
pub(super) struct Connection {
    socket: Arc<PacketSocket>,
    buffer: PacketBuffer,
}

/// Registers over a connection, which is the link's from then on.
pub(super) fn register(shared: &Shared, socket: PacketSocket) -> Result<Connection, ClientError> {
    let state = shared.lock();
    let (registration, changes) = (state.registration.clone(), state.changes);
    drop(state);
    let regions = registration.regions.clone();
    let call = Call::Register(registration);
    let files: Vec<BorrowedFd<'_>> = shared.files.iter().map(AsFd::as_fd).collect();
    let mut buffer = PacketBuffer::default();
    let request = Request { id: 0, call };
    let (answer, _) = client::ask(&socket, &mut buffer, &request, &files, |_| {})?;
    let Answer::Registered { generation: began, .. } = answer else {
        return Err(ClientError::NoAnswer);
    };
    socket.limit_receive(None)?;
    let socket = Arc::new(socket);
    let mut state = shared.lock();
    // A link that was dropped meanwhile will not shut this socket down.
    if state.stopped {
        return Err(ClientError::NoAnswer);
    }
    let continued = match state.first_generation {
        // A broker that does not say has no such call either.
        _ if began == 0 => None,
        None => {
            state.first_generation = Some(began.saturating_sub(changes));
            None
        }
        Some(first) => Some(Call::Continued { generation: first.saturating_add(state.changes) }),
    };
    // The broker's numbers start anew, and what was to be told to the one before means nothing to
    // this one. It takes a generation from before by the first call alone.
    shared.outbox.restart(continued);
    if state.registration.regions != regions {
        let regions = state.registration.regions.clone();
        shared.outbox.push(Call::RamChanged { regions, change: Change::Resized });
        // As the broker does.
        state.changes += 1;
    }
    state.socket = Some(Arc::clone(&socket));
    drop(state);
    shared.flush();
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
        state.views = Views::default();
        state.waiting.clear();
        state.lost += 1;
        state.events.lost();
        state.vcpus.lost();
        drop(state);
        shared.changed.notify_all();
        let path = shared.path.as_path();
        match ended {
            Ok(()) => tracing::warn!(path = %path.display(), "the broker closed the connection"),
            Err(error) => tracing::warn!(
                path = %path.display(),
                error = &error as &dyn std::error::Error,
                "the connection to the broker failed"
            ),
        }
        drop(connection);
        let losing = |state: &mut State| !state.stopped && state.events.is_losing;
        drop(
            shared
                .changed
                .wait_while(shared.lock(), losing)
                .unwrap_or_else(PoisonError::into_inner),
        );
        match register_again(shared, path) {
            Some(again) => connection = again,
            None => return,
        }
    }
}

/// Takes packets until the connection ends, and tells the broker of used tokens in between: here,
/// so that the vCPU that used one need not.
fn read(shared: &Shared, connection: &mut Connection) -> Result<(), ClientError> {
    let Connection { socket, buffer } = connection;
    let mut is_limited = false;
    loop {
        let may_tell = shared.lock().cache.has_grants(Instant::now()) || !shared.outbox.is_empty();
        if may_tell != is_limited {
            socket.limit_receive(may_tell.then_some(TELL_AFTER))?;
            is_limited = may_tell;
        }
        match socket.receive_lossy(buffer) {
            Ok(Some((message, files))) => {
                let mut state = shared.lock();
                // Before the caller can see its answer: what it sends next comes after this.
                if let Some(call) = take(&mut state, message, files)? {
                    shared.outbox.push(call);
                }
                drop(state);
                shared.changed.notify_all();
            }
            Ok(None) => return Ok(()),
            Err(PacketError::Receive(Errno::AGAIN)) if is_limited => {}
            Err(error) => return Err(error.into()),
        }
        shared.outbox.flush(socket, None);
    }
}

/// Takes one message in; returns what the broker is to be told for it. What is opened of a target
/// whose files were lost is undone.
fn take(
    state: &mut State,
    message: FromBroker,
    files: Option<Vec<OwnedFd>>,
) -> Result<Option<Call>, ClientError> {
    match message {
        FromBroker::Target { id, introduction, name, uuid, generation, regions } => {
            let map = MemoryMap::new(regions).map_err(ClientError::Map)?;
            let Some(files) = files else {
                state.cache.lose_target(id, introduction);
                if WARNINGS.allow(Instant::now()).is_some() {
                    tracing::warn!(
                        "no file descriptor is left for a target's RAM; raise the limit of open files"
                    );
                }
                return Ok(None);
            };
            let files = complete(&map, files.into())?;
            state.cache.insert_target(Target { id, name, uuid, generation, map, files });
        }
        FromBroker::Changed { target, generation, regions } => {
            let map = MemoryMap::new(regions).map_err(ClientError::Map)?;
            if let Some(known) =
                state.cache.target(target).filter(|known| known.generation < generation)
            {
                let files = complete(&map, Arc::clone(&known.files))?;
                let (name, uuid) = (known.name.clone(), known.uuid);
                let changed = Target { id: target, name, uuid, generation, map, files };
                state.cache.insert_target(changed);
                state.events.push(Event::Changed(target));
            }
        }
        FromBroker::Granted { token, grant, target, scope, expires_in_ms } => {
            if let Some(introduction) = state.cache.lost(target) {
                let unusable = Unusable::Token(grant);
                return Ok(Some(Call::Unreceived { target, introduction, unusable }));
            }
            // A token by which a view is being opened is used for that.
            if !state.views.is_under_way(&token) && !state.views.is_revoked(grant) {
                let lifetime = Duration::from_millis(expires_in_ms);
                state.cache.grant(Instant::now(), token, (grant, target, scope), lifetime);
            }
        }
        FromBroker::Revoke { grant } => {
            state.cache.revoke(grant);
            state.views.revoke(grant);
            state.events.push(Event::Revoke(grant));
        }
        FromBroker::AskVcpus { id, question } => state.vcpus.push(id, question),
        FromBroker::Gone { target } => {
            state.cache.forget(target);
            state.views.forget(target);
            state.events.push(Event::Gone(target));
        }
        FromBroker::Answer { id, answer } => return Ok(answered(state, id, Ok(answer))),
        FromBroker::Refused { id, refusal, .. } => {
            return Ok(answered(state, id, Err(refusal.into())));
        }
        FromBroker::Working => {}
    }
    Ok(None)
}

/// The files of a target, if they are all that its memory map names.
fn complete(map: &MemoryMap, files: Arc<[OwnedFd]>) -> Result<Arc<[OwnedFd]>, ClientError> {
    let (found, needed) = (files.len(), map.file_count());
    if found < needed { Err(ClientError::Files { found, needed }) } else { Ok(files) }
}

/// Hands an answer to the caller that asked. A view that no caller waits for any more, or whose
/// grant was revoked meanwhile, is closed at once. What was opened is undone where the target's
/// files have not arrived.
fn answered(state: &mut State, id: u64, mut answer: Result<Answer, RedeemError>) -> Option<Call> {
    state.views.end_request(id);
    let mut closed = None;
    let opened = match answer {
        Ok(Answer::Attached { view, target, .. }) => Some((target, Unusable::View(view))),
        Ok(Answer::Redeemed { grant, target, .. }) => Some((target, Unusable::Token(grant))),
        _ => None,
    };
    if let Some((target, unusable)) = opened
        && let Some(introduction) = state.cache.lost(target)
    {
        answer = Err(RedeemError::NoDescriptors);
        closed = Some(Call::Unreceived { target, introduction, unusable });
    }
    if let Ok(Answer::Attached { view, grant, target, .. }) = answer
        && (!state.waiting.contains_key(&id) || !state.views.open(view, grant, target))
    {
        answer = Err(RedeemError::Unknown);
        closed = Some(Call::Detached { view, counters: ViewCounters::default() });
    }
    // A caller that has given up has removed its entry.
    if let Some(waiting) = state.waiting.get_mut(&id) {
        *waiting = Some(answer);
    }
    closed
}

/// Registers again, with growing pauses; `None` when the link is dropped.
fn register_again(shared: &Shared, path: &Path) -> Option<Connection> {
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
        match client::connect(path).and_then(|socket| register(shared, socket)) {
            Ok(connection) => {
                tracing::info!(path = %path.display(), "registered with the broker again");
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

fn reason(error: &ClientError) -> String {
    match error {
        ClientError::Connect { source: PacketError::Connect(errno), .. } => {
            format!("{error}: {errno}")
        }
        _ => error.to_string(),
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One tool's connection to the proxy: it attaches a view, opens channels for copies, and is
//! notified of the view's end.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use kvmmem::view::GuestEndpointError;
use kvmmem::view::State;
use kvmmem::{Access, Event, Status, Token, View, ViewError};
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::map::Region;
use kvmmem_proto::message::{Answer, Call, Caller, FromBroker, Refusal, Request};
use kvmmem_proto::packet::{PacketBuffer, PacketError, PacketSocket, Wait};
use kvmmem_proto::scope::{Rights, Scope};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use uuid::Uuid;

use super::channel::Channel;
use super::connection::Connection;
use super::connection_limit::Stage;

/// The numbers of the one view of a connection, its grant and its target.
const VIEW: u64 = 1;
const GRANT: u64 = 1;
const TARGET: u64 = 1;

/// The most channels of a view.
const MAX_CHANNELS: usize = 4;

/// How often a tool is told that its view is still being opened.
const SIGN: Duration = Duration::from_secs(1);

/// How often it is looked whether the view has been opened, has changed or has ended.
const LOOK: Duration = Duration::from_millis(10);

/// How long a tool may take to ask for a view.
pub(super) const ASK_LIMIT: Duration = Duration::from_secs(10);

/// The refusal of an evicted tool.
const EVICTED: &str =
    "too many tools are connected, and this one had not asked for a view: ask again";

/// Attaches a view for a process.
pub(super) type Attach = dyn Fn(&Token, Access, Caller) -> Result<View, ViewError> + Send + Sync;

/// A refusal and its words.
type Refused = (Refusal, String);

/// A tool's view.
struct Opened {
    channels: Vec<Channel>,
    /// What the tool was told last.
    shown: Shown,
}

/// A target's memory as a tool is told of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shown {
    generation: u64,
    regions: Vec<Region>,
}

/// Serves a tool until it closes, its view has ended, or it is evicted.
pub(super) fn serve(connection: &Arc<Connection>, attach: &Attach, ask_limit: Duration) {
    let (socket, mut buffer) = (&connection.socket, PacketBuffer::default());
    // `None` until the view is open.
    let mut opened = None;
    let asked_by = Instant::now() + ask_limit;
    loop {
        match is_readable(socket) {
            Ok(false) => {}
            Ok(true) => match socket.receive(&mut buffer) {
                Ok(Some((request, files))) => {
                    if answer(connection, attach, &mut opened, request, &files).is_err() {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    let refused = (Refusal::Malformed, error.to_string());
                    let _ = refuse(socket, 0, refused);
                    return;
                }
            },
            Err(_) => return,
        }
        let goes_on = match &mut opened {
            Some(opened) => push(connection, opened),
            None if connection.slot.is_evicted() => {
                let _ = refuse(socket, 0, (Refusal::Limit, EVICTED.to_owned()));
                false
            }
            None => Instant::now() < asked_by,
        };
        if !goes_on {
            return;
        }
    }
}

/// Waits for a packet, for a moment.
fn is_readable(socket: &PacketSocket) -> Result<bool, Errno> {
    let limit = Timespec::try_from(LOOK).map_err(|_| Errno::INVAL)?;
    match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&limit)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Answers one request; fails where the tool does not read.
fn answer(
    connection: &Arc<Connection>,
    attach: &Attach,
    opened: &mut Option<Opened>,
    request: Request,
    files: &[OwnedFd],
) -> Result<(), PacketError> {
    let (Request { id, call }, socket) = (request, &connection.socket);
    let answered = match (call, &mut *opened) {
        (Call::Attach { token, caller, read_only, .. }, None) => {
            let Credentials { pid, uid } = connection.credentials;
            let caller = Caller { pid, uid, ..caller };
            let access = if read_only { Access::ReadOnly } else { Access::Granted };
            let slot = &connection.slot;
            let attach = || {
                if !slot.enter(Stage::Asking) {
                    return Err((Refusal::Limit, EVICTED.to_owned()));
                }
                let view = attach(&token, access, caller).map_err(|error| refusal_of(&error))?;
                let status = view.status().map_err(|error| refusal_of(&error))?;
                if status.state != State::Open {
                    let ended = "the view has ended as soon as it was open: ask for a new token";
                    return Err((Refusal::Unknown, ended.to_owned()));
                }
                Ok((status, view))
            };
            let attached = while_waiting(socket, attach).map(|(status, view)| {
                let shown = Shown { generation: generation(&view), regions: regions(&status) };
                let answer = attached(&status, &shown);
                connection.open(view);
                *opened = Some(Opened { channels: Vec::new(), shown });
                (answer, None)
            });
            slot.enter(if attached.is_ok() { Stage::Open } else { Stage::Idle });
            attached
        }
        (Call::OpenCopies { view: VIEW }, Some(opened)) => {
            let channel = open_channel(connection, &mut opened.channels, files);
            channel.map(|theirs| (Answer::CopiesOpened, Some(theirs)))
        }
        (call, _) if call.is_one_way() => return Ok(()),
        _ => Err((
            Refusal::Denied,
            "this is kvmmem proxy, which attaches one view a connection, by a token; ask kvmmemd on the host for anything else"
                .to_owned(),
        )),
    };
    match answered {
        Ok((answer, file)) => {
            let files: Vec<_> = file.iter().map(AsFd::as_fd).collect();
            socket.send(&FromBroker::Answer { id, answer }, &files, Wait::Limited)
        }
        Err(refused) => refuse(socket, id, refused),
    }
}

fn refuse(socket: &PacketSocket, id: u64, (refusal, message): Refused) -> Result<(), PacketError> {
    socket.send(&FromBroker::Refused { id, refusal, message }, &[], Wait::Limited)
}

/// Does what takes longer than a tool waits for an answer, and lets it know.
fn while_waiting<T: Send>(socket: &PacketSocket, act: impl FnOnce() -> T + Send) -> T {
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        // Without the thread, a tool of a slow machine may give up.
        let _ = std::thread::Builder::new().name("working".into()).spawn_scoped(scope, move || {
            while is_done.recv_timeout(SIGN) == Err(RecvTimeoutError::Timeout) {
                let _ = socket.send(&FromBroker::Working, &[], Wait::No);
            }
        });
        let result = act();
        drop(done);
        result
    })
}

/// What a tool is told of its view.
fn attached(status: &Status, shown: &Shown) -> Answer {
    let rights = if status.is_writable { Rights::ReadWrite } else { Rights::ReadOnly };
    Answer::HostAttached {
        view: VIEW,
        grant: GRANT,
        target: TARGET,
        scope: Scope { rights, spans: None },
        uuid: Uuid::from_bytes(status.uuid),
        name: String::new(),
        generation: shown.generation,
        regions: shown.regions.clone(),
        copied: true,
    }
}

/// Number of the target's run, which grows.
fn generation(view: &View) -> u64 {
    view.instance().ok().flatten().unwrap_or_default()
}

/// The view's ranges; where they are in a file has no meaning, and must differ.
fn regions(status: &Status) -> Vec<Region> {
    let region = |range: &kvmmem::Range| {
        let kvmmem::Range { gpa, len } = *range;
        Region { gpa, len, offset: gpa, file: 0 }
    };
    status.ranges.iter().map(region).collect()
}

fn open_channel(
    connection: &Arc<Connection>,
    channels: &mut Vec<Channel>,
    files: &[OwnedFd],
) -> Result<OwnedFd, Refused> {
    let [file] = files else {
        let message = "a channel for copies comes with one memfd".to_owned();
        return Err((Refusal::Invalid, message));
    };
    if channels.len() >= MAX_CHANNELS {
        let message = format!("this connection has {MAX_CHANNELS} channels already");
        return Err((Refusal::Limit, message));
    }
    let (channel, theirs) = Channel::open(connection, file)?;
    channels.push(channel);
    Ok(theirs)
}

/// Pushes what has happened to the view; whether it is open. The view may end while the tool does
/// not read.
fn push(connection: &Connection, opened: &mut Opened) -> bool {
    let happened = connection.with_view(|view| {
        let event = match view.wait(Duration::ZERO) {
            Ok(event) => event?,
            Err(_) => Event::Gone,
        };
        Some((event, view.status().ok(), generation(view)))
    });
    let Some(happened) = happened else { return false };
    let Some((event, status, generation)) = happened else { return true };
    messages(event, status.as_ref(), generation, &mut opened.shown).iter().all(|message| {
        let sent = connection.socket.send(message, &[], Wait::Limited);
        sent.is_ok() && matches!(message, FromBroker::Changed { .. })
    })
}

/// What a tool is told of an event. The view may have ended since, and its end may have overtaken a
/// change, which tools need to know: what they have read is of two runs.
fn messages(
    event: Event,
    status: Option<&Status>,
    generation: u64,
    shown: &mut Shown,
) -> Vec<FromBroker> {
    let changed = |Shown { generation, regions }: &Shown| FromBroker::Changed {
        target: TARGET,
        generation: *generation,
        regions: regions.clone(),
    };
    let end = match (event, status) {
        (Event::Changed, Some(status)) if status.state == State::Open => {
            *shown = Shown { generation, regions: regions(status) };
            return vec![changed(shown)];
        }
        (Event::Revoked, _) | (_, Some(Status { state: State::Revoked, .. })) => {
            FromBroker::Revoke { grant: GRANT }
        }
        _ => FromBroker::Gone { target: TARGET },
    };
    let is_overtaken = generation != 0 && generation != shown.generation;
    let last = Shown { generation, ..shown.clone() };
    is_overtaken.then(|| changed(&last)).into_iter().chain([end]).collect()
}

/// The refusal that an error amounts to, with its causes.
fn refusal_of(error: &ViewError) -> Refused {
    let refusal = match error {
        ViewError::GuestEndpoint(error) => match &**error {
            GuestEndpointError::Refused { refusal, .. } => *refusal,
            _ => Refusal::Unsupported,
        },
        ViewError::Gone { .. } | ViewError::Revoked { .. } => Refusal::Unknown,
        _ => Refusal::Unsupported,
    };
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    (refusal, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_view_is_told_as_what_it_is_and_hides_no_change() {
        let ranges = vec![kvmmem::Range { gpa: 0, len: 0x1000 }];
        let status = |state, ranges: &[kvmmem::Range]| Status {
            generation: 4,
            state,
            is_writable: false,
            uuid: [0; 16],
            ranges: ranges.to_vec(),
        };
        let (open, revoked) = (status(State::Open, &ranges), status(State::Revoked, &[]));
        let before = Shown { generation: 7, regions: regions(&open) };
        let told = |event, status, generation| {
            let mut shown = before.clone();
            let messages = messages(event, status, generation, &mut shown);
            let words = messages.iter().map(|message| match message {
                FromBroker::Changed { generation, regions, .. } => {
                    assert_eq!(*regions, before.regions);
                    ("changed", *generation)
                }
                FromBroker::Revoke { .. } => ("revoked", 0),
                FromBroker::Gone { .. } => ("gone", 0),
                other => panic!("{other:?}"),
            });
            (words.collect::<Vec<_>>(), shown.generation)
        };
        assert_eq!(told(Event::Changed, Some(&open), 8), (vec![("changed", 8)], 8));
        // It has ended between the event and the question.
        assert_eq!(told(Event::Changed, Some(&revoked), 7).0, [("revoked", 0)]);
        assert_eq!(told(Event::Changed, None, 7).0, [("gone", 0)]);
        assert_eq!(told(Event::Revoked, Some(&revoked), 7).0, [("revoked", 0)]);
        // The change came just before.
        assert_eq!(told(Event::Revoked, Some(&revoked), 8).0, [("changed", 8), ("revoked", 0)]);
        assert_eq!(told(Event::Gone, None, 8).0, [("changed", 8), ("gone", 0)]);
        // Not known any more.
        assert_eq!(told(Event::Gone, None, 0).0, [("gone", 0)]);
    }
}

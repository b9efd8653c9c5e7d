// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies of a target's memory, for views of RAM that only its VMM can map.
//!
//! A tool opens a few *channels* for its view: a socket for requests and a memfd for the bytes,
//! with a thread of the broker each ([`kvmmem_proto::copy`] has the packets). What the view may
//! copy is looked up again after every `CHUNK`, so a revocation ends a copy that is under way,
//! and is confirmed only when the chunk has ended. The channels end with the connection that opened
//! them.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, RwLockReadGuard};
use std::time::Duration;

use kvmmem_proto::copy::{BUFFER, CopyAnswer, CopyRequest, MAX_REQUEST, Status};
use kvmmem_proto::map::Region;
use kvmmem_proto::message::{Answer, Refusal};
use kvmmem_proto::scope::Rights;
use kvmmem_sys::copy_buffer::CopyBuffer;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};

use crate::audit::Event;
use crate::broker::Broker;
use crate::core::call_error::CallError;
use crate::peer::{MAX_CHANNELS, Peer};
use crate::ram::{AccessError, Ram};

/// How much is copied before it is looked up again whether that is still allowed, bytes.
const CHUNK: usize = 64 * 1024;

/// A channel's stack, bytes.
const STACK: usize = 256 << 10;

/// How long a request that is refused delays the next one of its channel.
const PAUSE: Duration = Duration::from_millis(1);

/// A channel: its end of the socket, and what it serves.
struct Channel {
    broker: Arc<Broker>,
    peer: Arc<Peer>,
    view: u64,
    socket: Arc<OwnedFd>,
    buffer: CopyBuffer,
}

/// What a view reaches, for the next so many bytes; no revocation is confirmed meanwhile.
struct Reach<'a> {
    _copying: RwLockReadGuard<'a, ()>,
    ram: Arc<Ram>,
    regions: Vec<Region>,
    left: usize,
}

/// How far a piece was copied, and why no further.
type Stop = (usize, Status, String);

impl Broker {
    /// Opens a channel for copies from a view of this connection's, by way of the memfd that came
    /// with the request. The peer's end of the socket goes with the answer.
    ///
    /// # Errors
    /// Where the connection has no such view or too many channels, the target's RAM can be mapped,
    /// or the file is not such a memfd.
    pub(crate) fn open_copies(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        view: u64,
        mut files: Vec<OwnedFd>,
    ) -> Result<(Answer, Vec<OwnedFd>), CallError> {
        let invalid = |what: &str| CallError::new(Refusal::Invalid, what);
        let (ram, ..) = self.copied(peer, view)?;
        if !ram.is_private() {
            return Err(invalid("the target's RAM is mapped, not copied"));
        }
        let (Some(file), true) = (files.pop(), files.is_empty()) else {
            return Err(invalid("a channel for copies comes with one memfd"));
        };
        let buffer = CopyBuffer::map(file.as_fd(), BUFFER).map_err(|error| {
            invalid(&format!(
                "a channel's memfd must have {BUFFER:#x} bytes, allocated, sealed with F_SEAL_SHRINK: {error}"
            ))
        })?;
        let system = |error: Errno| {
            CallError::new(Refusal::Limit, format!("cannot open a channel: {error}"))
        };
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(system)?;
        let slot = ChannelSlot::take(self, peer, Arc::new(ours))?;
        let (socket, (broker, peer)) =
            (Arc::clone(&slot.socket), (Arc::clone(self), Arc::clone(peer)));
        let thread = std::thread::Builder::new().name("copies".into()).stack_size(STACK);
        let started = thread.spawn(move || {
            let _slot = slot;
            Channel { broker, peer, view, socket, buffer }.serve();
        });
        match started {
            Ok(_) => Ok((Answer::CopiesOpened, vec![theirs])),
            Err(error) => {
                Err(CallError::new(Refusal::Limit, format!("cannot start a thread: {error}")))
            }
        }
    }

    /// The RAM of the target of a view of this connection's, where its memory is that the view
    /// reaches, and the view's rights.
    fn copied(&self, peer: &Peer, view: u64) -> Result<(Arc<Ram>, Vec<Region>, Rights), CallError> {
        let ended = || {
            CallError::new(Refusal::Unknown, format!("view {view} is not open on this connection"))
        };
        let (vm, scope) = self.reached(peer, view).ok_or_else(ended)?;
        let ram = vm.ram().ok_or_else(ended)?;
        let regions = scope.regions(&ram.layout().map);
        Ok((ram, regions, scope.rights))
    }
}

impl Channel {
    /// Serves until the peer closes, breaks the protocol or does not read its answers, or the
    /// connection ends.
    fn serve(&self) {
        let mut packet = vec![0; MAX_REQUEST + 1];
        loop {
            let count =
                match rustix::net::recv(&self.socket, packet.as_mut_slice(), RecvFlags::empty()) {
                    Ok((0, _)) => return,
                    Ok((_, count)) => count,
                    Err(Errno::INTR) => continue,
                    Err(_) => return,
                };
            let Some(request) = packet.get(..count).and_then(CopyRequest::decode) else {
                let (peer, reason) = (&self.peer, "malformed request for copies");
                self.broker.audit().write(Event::Refused { peer, vm: None, reason });
                return;
            };
            let answer = self.copy(&request).encode();
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            if rustix::net::send(&self.socket, &answer, flags).is_err() {
                return;
            }
        }
    }

    fn copy(&self, request: &CopyRequest) -> CopyAnswer {
        let (mut reach, mut at) = (None, usize::try_from(request.at).unwrap_or(usize::MAX));
        let (mut pieces, mut bytes, mut status) = (0, 0, Status::Done);
        for piece in &request.pieces {
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
            if let Err((done, why, message)) =
                self.copy_piece(&mut reach, request.write, piece.gpa, at, len)
            {
                (bytes, status) = (u32::try_from(done).unwrap_or(0), why);
                let (peer, reason) = (&self.peer, &message);
                self.broker.audit().write(Event::Refused { peer, vm: None, reason });
                if status == Status::Ended {
                    std::thread::sleep(PAUSE);
                }
                break;
            }
            at = at.saturating_add(len);
            pieces += 1;
        }
        CopyAnswer { id: request.id, status, pieces, bytes }
    }

    /// Copies `len` bytes between a guest-physical address and a place in the buffer.
    fn copy_piece<'a>(
        &'a self,
        reach: &mut Option<Reach<'a>>,
        write: bool,
        gpa: u64,
        at: usize,
        len: usize,
    ) -> Result<(), Stop> {
        let mut done = 0;
        while done < len {
            let gpa = gpa.saturating_add(done as u64);
            if reach.as_ref().is_none_or(|reach| reach.left == 0) {
                // A confirmation that waits goes first.
                *reach = None;
                *reach =
                    Some(self.reach(write).map_err(|(status, message)| (done, status, message))?);
            }
            let Some(reach) = reach.as_mut() else { continue };
            let left = |region: &Region| {
                region.len.checked_sub(gpa.checked_sub(region.gpa)?).filter(|len| *len > 0)
            };
            let hole = || {
                let message = format!("view {} reaches no RAM at gpa {gpa:#x}", self.view);
                (done, Status::Hole, message)
            };
            let in_region = reach.regions.iter().find_map(left).ok_or_else(hole)?;
            let most =
                usize::try_from(in_region).unwrap_or(usize::MAX).min(reach.left).min(len - done);
            let copied = reach.ram.copy_some(gpa, most, |file, offset, len| match write {
                true => self.buffer.drain(at + done, len, file, offset),
                false => self.buffer.fill(at + done, len, file, offset),
            });
            let count = match copied {
                Ok(count) => count,
                // The VMM has ended: the target is as good as gone, and the news of it on its way.
                Err(error @ AccessError::System { source: Errno::SRCH, .. }) => {
                    return Err((done, Status::Ended, error.to_string()));
                }
                Err(error) => return Err((done, Status::NoMemory, error.to_string())),
            };
            reach.left -= count;
            done += count;
        }
        Ok(())
    }

    /// What the view reaches now.
    fn reach(&self, write: bool) -> Result<Reach<'_>, (Status, String)> {
        let copying = self.peer.copying();
        let (ram, regions, rights) = self
            .broker
            .copied(&self.peer, self.view)
            .map_err(|refused| (Status::Ended, refused.message))?;
        if write && rights != Rights::ReadWrite {
            return Err((Status::ReadOnly, format!("view {} is read-only", self.view)));
        }
        Ok(Reach { _copying: copying, ram, regions, left: CHUNK })
    }
}

/// A channel's share of the limits of all channels and of its connection's, given back on drop. The
/// socket is closed before that: closing it may block for as long as the peer likes.
struct ChannelSlot {
    peer: Arc<Peer>,
    socket: Arc<OwnedFd>,
    _used: QuotaUse,
}

/// What a channel takes of the quota, given back on drop.
struct QuotaUse {
    broker: Arc<Broker>,
    uid: u32,
}

impl ChannelSlot {
    fn take(
        broker: &Arc<Broker>,
        peer: &Arc<Peer>,
        socket: Arc<OwnedFd>,
    ) -> Result<Self, CallError> {
        let full = |why: String| {
            CallError::new(Refusal::Limit, format!("cannot open a channel for copies: {why}"))
        };
        let who = peer.credentials();
        let taken = broker.tables().core.channels.take(who);
        taken.map_err(|exceeded| full(exceeded.to_string()))?;
        let used = QuotaUse { broker: Arc::clone(broker), uid: who.uid };
        if !peer.add_channel(&socket) {
            return Err(full(format!("this connection has {MAX_CHANNELS} already")));
        }
        Ok(Self { peer: Arc::clone(peer), socket, _used: used })
    }
}

impl Drop for ChannelSlot {
    fn drop(&mut self) {
        // The peer's next request fails, also where its thread has ended first.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        self.peer.remove_channel(&self.socket);
    }
}

impl Drop for QuotaUse {
    fn drop(&mut self) {
        self.broker.tables().core.channels.give_back(self.uid);
    }
}

#[cfg(test)]
mod tests;

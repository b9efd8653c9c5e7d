// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A channel for copies ([`kvmmem_proto::copy`]), served from a view.
//!
//! The memfd is the tool's, which may change it at any moment: it is read and written by system
//! calls alone.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvmmem::{View, ViewError};
use kvmmem_proto::copy::{BUFFER, CopyAnswer, CopyRequest, MAX_REQUEST, Piece, SLOT, Status};
use kvmmem_proto::message::Refusal;
use kvmmem_sys::copy_buffer::CopyBuffer;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send, shutdown,
    socketpair,
};

/// An open channel. Dropping it ends it and waits for a copy that is under way.
#[derive(Debug)]
pub(super) struct Channel {
    socket: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Channel {
    /// Opens a channel by way of a tool's memfd, and returns the tool's end of its socket.
    pub(super) fn open(
        view: &Arc<View>,
        file: OwnedFd,
    ) -> Result<(Self, OwnedFd), (Refusal, String)> {
        // That it can be mapped says that it is such a memfd, so that no access to it blocks.
        CopyBuffer::map(file.as_fd(), BUFFER).map_err(|error| {
            let message = format!(
                "a channel's memfd must have {BUFFER:#x} bytes, allocated, sealed with F_SEAL_SHRINK: {error}"
            );
            (Refusal::Invalid, message)
        })?;
        let limit = |what: &str, error: &dyn std::error::Error| {
            (Refusal::Limit, format!("cannot {what} for a channel: {error}"))
        };
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|error| limit("make a socket", &error))?;
        let socket = Arc::new(ours);
        let spawned = std::thread::Builder::new().name("copies".into()).spawn({
            let (socket, view, file) = (Arc::clone(&socket), Arc::clone(view), File::from(file));
            move || serve(&socket, &file, &view)
        });
        let thread = Some(spawned.map_err(|error| limit("start a thread", &error))?);
        Ok((Self { socket, thread }, theirs))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // It fails only where the tool was faster.
        let _ = shutdown(&self.socket, Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Serves until the tool closes, breaks the protocol or does not read its answers, or the channel
/// ends.
fn serve(socket: &OwnedFd, file: &File, view: &View) {
    let (mut packet, mut bytes) = (vec![0; MAX_REQUEST + 1], vec![0; SLOT]);
    loop {
        let count = match recv(socket, packet.as_mut_slice(), RecvFlags::empty()) {
            Ok((0, _)) => break,
            Ok((_, count)) => count,
            Err(Errno::INTR) => continue,
            Err(_) => break,
        };
        let Some(request) = packet.get(..count).and_then(CopyRequest::decode) else { break };
        let Ok(answer) = copy(&request, file, view, &mut bytes) else { break };
        if send(socket, &answer.encode(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_err() {
            break;
        }
    }
    // The tool's next request fails.
    let _ = shutdown(socket, Shutdown::Both);
}

/// Carries out a request; fails where the tool's memfd does.
fn copy(
    request: &CopyRequest,
    file: &File,
    view: &View,
    bytes: &mut [u8],
) -> io::Result<CopyAnswer> {
    let (mut at, mut pieces) = (u64::from(request.at), 0);
    for piece in &request.pieces {
        let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
        // The pieces of a request are no longer than a slot.
        let bytes = bytes.get_mut(..len).ok_or(io::ErrorKind::InvalidInput)?;
        let copied = if request.write {
            file.read_exact_at(bytes, at)?;
            view.write_at(piece.gpa, bytes)
        } else {
            view.read_at(piece.gpa, bytes)
        };
        let (count, status) = match &copied {
            Ok(()) => (len, Status::Done),
            Err(error) => (before_hole(error, piece), status_of(error)),
        };
        if !request.write {
            file.write_all_at(bytes.get(..count).unwrap_or_default(), at)?;
        }
        if copied.is_err() {
            let bytes = u32::try_from(count).unwrap_or_default();
            return Ok(CopyAnswer { id: request.id, status, pieces, bytes });
        }
        at += u64::from(piece.len);
        pieces += 1;
    }
    Ok(CopyAnswer { id: request.id, status: Status::Done, pieces, bytes: 0 })
}

/// How many bytes of a piece were copied before the view's next hole.
fn before_hole(error: &ViewError, piece: &Piece) -> usize {
    let ViewError::Hole { gpa, .. } = error else { return 0 };
    let count = gpa.saturating_sub(piece.gpa).min(piece.len.into());
    usize::try_from(count).unwrap_or_default()
}

fn status_of(error: &ViewError) -> Status {
    match error {
        ViewError::Hole { .. } => Status::Hole,
        ViewError::ReadOnly { .. } => Status::ReadOnly,
        ViewError::Revoked { .. } | ViewError::Gone { .. } => Status::Ended,
        _ => Status::NoMemory,
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A channel for copies ([`kvmmem_proto::copy`]), served from a view.
//!
//! The memfd is the tool's, which may change it at any moment. It is mapped, and the mapping is
//! accessed by system calls alone, as in the broker. It is never written by `write`: that waits for
//! the file's lock, which a tool can keep for as long as it likes, by a `write` of its own from
//! memory that does not come.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use kvmmem::{View, ViewError};
use kvmmem_proto::copy::{BUFFER, CopyAnswer, CopyRequest, MAX_REQUEST, Piece, SLOT, Status};
use kvmmem_proto::message::Refusal;
use kvmmem_sys::copy_buffer::CopyBuffer;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send, shutdown,
    socketpair,
};

use super::connection::Connection;

/// An open channel. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Channel {
    socket: Arc<OwnedFd>,
}

/// Where a channel's bytes pass.
struct Buffers {
    tool: CopyBuffer,
    /// A file of this process alone, for the system calls that access the tool's.
    own: File,
}

impl Channel {
    /// Opens a channel by way of a tool's memfd, and returns the tool's end of its socket.
    pub(super) fn open(
        connection: &Arc<Connection>,
        file: &OwnedFd,
    ) -> Result<(Self, OwnedFd), (Refusal, String)> {
        let tool = CopyBuffer::map(file.as_fd(), BUFFER).map_err(|error| {
            let message = format!(
                "a channel's memfd must have {BUFFER:#x} bytes, allocated, sealed with F_SEAL_SHRINK: {error}"
            );
            (Refusal::Invalid, message)
        })?;
        let limit = |what: &str, error: &dyn std::error::Error| {
            (Refusal::Limit, format!("cannot {what} for a channel: {error}"))
        };
        let own = memfd_create("kvmmem-proxy", MemfdFlags::CLOEXEC)
            .map_err(|error| limit("make a buffer", &error))?;
        let buffers = Buffers { tool, own: File::from(own) };
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|error| limit("make a socket", &error))?;
        let channel = Self { socket: Arc::new(ours) };
        std::thread::Builder::new()
            .name("copies".into())
            .spawn({
                let (socket, connection) = (Arc::clone(&channel.socket), Arc::clone(connection));
                move || serve(&socket, &buffers, &connection)
            })
            .map_err(|error| limit("start a thread", &error))?;
        Ok((channel, theirs))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // It fails only where the tool was faster.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

impl Buffers {
    /// Copies what the tool wrote.
    fn load(&self, at: usize, to: &mut [u8]) -> io::Result<()> {
        whole(self.tool.drain(at, to.len(), self.own.as_fd(), 0)?, to.len())?;
        self.own.read_exact_at(to, 0)
    }

    /// Copies what the tool will read.
    fn store(&self, at: usize, from: &[u8]) -> io::Result<()> {
        self.own.write_all_at(from, 0)?;
        whole(self.tool.fill(at, from.len(), self.own.as_fd(), 0)?, from.len())
    }
}

/// Fails where the tool has taken away memory of its buffer, and none is left for it.
fn whole(count: usize, len: usize) -> io::Result<()> {
    if count == len { Ok(()) } else { Err(Errno::FAULT.into()) }
}

/// Serves until the tool closes, breaks the protocol or does not read its answers, or the channel
/// ends.
fn serve(socket: &OwnedFd, buffers: &Buffers, connection: &Connection) {
    let (mut packet, mut bytes) = (vec![0; MAX_REQUEST + 1], vec![0; SLOT]);
    loop {
        let count = match recv(socket, packet.as_mut_slice(), RecvFlags::empty()) {
            Ok((0, _)) => break,
            Ok((_, count)) => count,
            Err(Errno::INTR) => continue,
            Err(_) => break,
        };
        let Some(request) = packet.get(..count).and_then(CopyRequest::decode) else { break };
        let copied = connection.with_view(|view| copy(&request, buffers, view, &mut bytes));
        let ended = CopyAnswer { id: request.id, status: Status::Ended, pieces: 0, bytes: 0 };
        let Ok(answer) = copied.unwrap_or(Ok(ended)) else { break };
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
    buffers: &Buffers,
    view: &View,
    bytes: &mut [u8],
) -> io::Result<CopyAnswer> {
    let (mut at, mut pieces) = (usize::try_from(request.at).unwrap_or(usize::MAX), 0);
    for piece in &request.pieces {
        let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
        // The pieces of a request are no longer than a slot.
        let bytes = bytes.get_mut(..len).ok_or(io::ErrorKind::InvalidInput)?;
        let copied = if request.write {
            buffers.load(at, bytes)?;
            view.write_at(piece.gpa, bytes)
        } else {
            view.read_at(piece.gpa, bytes)
        };
        let (count, status) = match &copied {
            Ok(()) => (len, Status::Done),
            Err(error) => (before_hole(error, piece), status_of(error)),
        };
        if !request.write {
            buffers.store(at, bytes.get(..count).unwrap_or_default())?;
        }
        if copied.is_err() {
            let bytes = u32::try_from(count).unwrap_or_default();
            return Ok(CopyAnswer { id: request.id, status, pieces, bytes });
        }
        at = at.saturating_add(len);
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
        ViewError::System { source: Errno::AGAIN, .. } => Status::Busy,
        _ => Status::NoMemory,
    }
}

#[cfg(test)]
mod tests {
    use kvmmem::view::ViewOperation;

    use super::*;

    #[test]
    fn a_view_that_is_changing_is_no_hole_in_memory() {
        let of = |source| {
            let operation = ViewOperation::Read { gpa: 0, len: 1 };
            status_of(&ViewError::System { operation, source })
        };
        assert_eq!(of(Errno::AGAIN), Status::Busy);
        assert_eq!(of(Errno::IO), Status::NoMemory);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Packets over a unix SOCK_SEQPACKET socket: one JSON object each, with at most [`MAX_FILES`] file
//! descriptors.

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::{Zeroize, Zeroizing};

use crate::map::MAX_FILES;
use crate::message::MAX_PACKET;
use crate::scope::MAX_SPANS;

/// Room for each packet that holds a token, bytes.
const TOKEN_PACKET: usize = 512 + MAX_SPANS * 64;

/// Why a packet did not get through.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The socket could not be made or connected.
    #[error("cannot connect")]
    Connect(#[source] Errno),
    /// Sending failed; `AGAIN` where the peer does not read.
    #[error("cannot send a packet")]
    Send(#[source] Errno),
    /// Receiving failed; `AGAIN` where nothing came in time.
    #[error("cannot receive a packet")]
    Receive(#[source] Errno),
    /// The packet is larger than [`MAX_PACKET`].
    #[error("packet is larger than {MAX_PACKET:#x} bytes")]
    TooLong,
    /// The packet brings more than [`MAX_FILES`] file descriptors.
    #[error("packet brings more than {MAX_FILES} file descriptors")]
    TooManyFds,
    /// This process may have no more file descriptors, and the packet brings some. They are lost.
    #[error("no file descriptor is left for those of a packet")]
    NoDescriptors,
    /// The packet is not the JSON object that was expected.
    #[error("packet is malformed")]
    Malformed(#[source] serde_json::Error),
    /// The message cannot be written as JSON.
    #[error("message cannot be written")]
    Encode(#[source] serde_json::Error),
}

/// A message and the files beside it; `None` where this process has no descriptors left for them.
pub type LossyPacket<T> = (T, Option<Vec<OwnedFd>>);

/// Whether to wait for a peer that does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Up to the socket's limit.
    Limited,
    /// Not at all.
    No,
}

/// One end of a connection. All methods may be called from several threads; a packet is never
/// interleaved.
#[derive(Debug)]
pub struct PacketSocket {
    fd: Arc<OwnedFd>,
}

/// Where packets are received into; wiped after each.
pub struct PacketBuffer(Vec<u8>);

impl fmt::Debug for PacketBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PacketBuffer(..)")
    }
}

impl Default for PacketBuffer {
    fn default() -> Self {
        Self(vec![0; MAX_PACKET])
    }
}

impl PacketSocket {
    /// Connects to the socket at `path`; no step of it, nor a send later, waits longer than
    /// `limit`.
    ///
    /// # Errors
    /// [`PacketError::Connect`].
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, PacketError> {
        let socket = || -> Result<Self, Errno> {
            let address = SocketAddrUnix::new(path)?;
            let fd = rustix::net::socket_with(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )?;
            set_socket_timeout(&fd, Timeout::Send, Some(limit))?;
            rustix::net::connect(&fd, &address)?;
            Ok(Self { fd: Arc::new(fd) })
        };
        socket().map_err(PacketError::Connect)
    }

    /// The connection that `accept` returned; a send waits at most `limit`.
    ///
    /// # Errors
    /// [`PacketError::Connect`].
    pub fn accepted(fd: OwnedFd, limit: Duration) -> Result<Self, PacketError> {
        set_socket_timeout(&fd, Timeout::Send, Some(limit)).map_err(PacketError::Connect)?;
        Ok(Self { fd: Arc::new(fd) })
    }

    /// Limits how long [`Self::receive`] waits; `None` for ever.
    ///
    /// # Errors
    /// [`PacketError::Receive`].
    pub fn limit_receive(&self, limit: Option<Duration>) -> Result<(), PacketError> {
        set_socket_timeout(&self.fd, Timeout::Recv, limit).map_err(PacketError::Receive)
    }

    /// Sends one message, with `fds` beside it.
    ///
    /// # Errors
    /// [`PacketError::Send`], [`PacketError::TooLong`], [`PacketError::TooManyFds`],
    /// [`PacketError::Encode`].
    pub fn send(
        &self,
        message: &impl Serialize,
        fds: &[BorrowedFd<'_>],
        wait: Wait,
    ) -> Result<(), PacketError> {
        // A message with a token fits in at once, so that no copy of it stays behind in a smaller
        // buffer. The longest is an attach with all the spans that it may name.
        let mut bytes = Zeroizing::new(Vec::with_capacity(TOKEN_PACKET));
        serde_json::to_writer(&mut *bytes, message).map_err(PacketError::Encode)?;
        if bytes.len() > MAX_PACKET {
            return Err(PacketError::TooLong);
        }
        let mut flags = SendFlags::NOSIGNAL;
        if wait == Wait::No {
            flags |= SendFlags::DONTWAIT;
        }
        if fds.len() > MAX_FILES {
            return Err(PacketError::TooManyFds);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            // There is room for that many.
            let _ = control.push(SendAncillaryMessage::ScmRights(fds));
        }
        loop {
            match rustix::net::sendmsg(&self.fd, &[IoSlice::new(&bytes)], &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(PacketError::Send(error)),
            }
        }
    }

    /// Receives one message and the file descriptors beside it; `None` when the peer has closed.
    ///
    /// # Errors
    /// [`PacketError::Receive`], [`PacketError::TooLong`], [`PacketError::TooManyFds`],
    /// [`PacketError::NoDescriptors`], [`PacketError::Malformed`].
    pub fn receive<T: DeserializeOwned>(
        &self,
        buffer: &mut PacketBuffer,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, PacketError> {
        match self.receive_lossy(buffer)? {
            Some((message, Some(files))) => Ok(Some((message, files))),
            Some((_, None)) => Err(PacketError::NoDescriptors),
            None => Ok(None),
        }
    }

    /// As [`Self::receive`], for a receiver that does something about files that are lost.
    ///
    /// # Errors
    /// Those of [`Self::receive`] but [`PacketError::NoDescriptors`].
    pub fn receive_lossy<T: DeserializeOwned>(
        &self,
        buffer: &mut PacketBuffer,
    ) -> Result<Option<LossyPacket<T>>, PacketError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut slices = [IoSliceMut::new(&mut buffer.0)];
            match rustix::net::recvmsg(&self.fd, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)
            {
                Ok(received) => break received,
                // The peer went away with packets unread. The error is told once; what the peer had
                // sent before, and then the end, can still be received.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Err(error) => return Err(PacketError::Receive(error)),
            }
        };
        // Alignment leaves room for a few more; the kernel drops those that do not fit and says so.
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let bytes = buffer.0.get_mut(..received.bytes).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(None);
        }
        let parsed = serde_json::from_slice(bytes);
        bytes.zeroize();
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(PacketError::TooLong);
        }
        let is_short = received.flags.contains(ReturnFlags::CTRUNC);
        let is_lost = is_short && fds.len() < MAX_FILES;
        if !is_lost && (is_short || fds.len() > MAX_FILES) {
            return Err(PacketError::TooManyFds);
        }
        Ok(Some((parsed.map_err(PacketError::Malformed)?, (!is_lost).then_some(fds))))
    }

    /// The file descriptor, for a thread that waits for many of them.
    pub fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Ends the connection: wakes the threads that receive on it, here and at the peer.
    pub fn shut_down(&self) {
        // It fails only where the connection has ended already.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Call, Caller, Request};
    use crate::scope::Span;
    use kvmmem_kvmi::token::Token;

    #[test]
    fn the_longest_attach_is_written_without_a_second_buffer() {
        let caller = Caller { pid: u32::MAX, uid: u32::MAX, comm: "\u{1}".repeat(16) };
        let reaching = vec![Span { gpa: u64::MAX, len: u64::MAX }; MAX_SPANS];
        let call = Call::Attach { token: Token::new([0; 4]), caller, read_only: false, reaching };
        let text = serde_json::to_vec(&Request { id: u64::MAX, call }).unwrap();
        assert!(text.len() <= TOKEN_PACKET, "{}", text.len());
    }
}

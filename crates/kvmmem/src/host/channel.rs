// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tool's end of a channel for copies ([`kvmmem_proto::copy`]): requests go out, answers come
//! back in order.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvmmem_proto::copy::{ANSWER, BUFFER, CopyAnswer, CopyRequest, Piece, SLOT, SLOTS};
use kvmmem_sys::copy_buffer::CopyBuffer;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags};

use kvmmem_proto::client::LIMIT;

/// An open channel.
///
/// # Invariants
///
/// `awaited` are the ids of the requests that were sent and not answered, oldest first, at most
/// [`SLOTS`]. The broker may use their slots of the buffer; the other slots are ours.
#[derive(Debug)]
pub(super) struct Channel {
    socket: Arc<OwnedFd>,
    buffer: CopyBuffer,
    last: u32,
    awaited: VecDeque<u32>,
}

/// Why a channel carries nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChannelError {
    /// The broker has closed it, or breaks the protocol.
    Closed,
    /// No answer came in time.
    NoAnswer,
    /// The system refused.
    System(Errno),
}

impl Channel {
    /// A buffer, and the memfd to send to the broker.
    pub(super) fn buffer() -> Result<(CopyBuffer, OwnedFd), Errno> {
        CopyBuffer::create(BUFFER)
    }

    /// The channel that the broker has opened for a buffer.
    pub(super) fn new(socket: OwnedFd, buffer: CopyBuffer) -> Result<Self, Errno> {
        set_socket_timeout(&socket, Timeout::Recv, Some(LIMIT))?;
        set_socket_timeout(&socket, Timeout::Send, Some(LIMIT))?;
        Ok(Self {
            socket: Arc::new(socket),
            buffer,
            last: 0,
            awaited: VecDeque::with_capacity(SLOTS),
        })
    }

    /// The socket, for ending the channel from another thread.
    pub(super) fn socket(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.socket)
    }

    /// Where the next request's bytes are, if a slot is free.
    pub(super) fn free_slot(&self) -> Option<usize> {
        let next = usize::try_from(self.last).unwrap_or(0) % SLOTS;
        (self.awaited.len() < SLOTS).then_some(next * SLOT)
    }

    /// Sends a request whose bytes are in the free slot.
    pub(super) fn send(&mut self, write: bool, pieces: Vec<Piece>) -> Result<(), ChannelError> {
        let at =
            self.free_slot().and_then(|at| u32::try_from(at).ok()).ok_or(ChannelError::Closed)?;
        // Ids start again at 0 after u32::MAX, which is the last of a round of slots.
        let id = self.last;
        let packet = CopyRequest { id, write, at, pieces }.encode();
        loop {
            match rustix::net::send(&self.socket, &packet, SendFlags::NOSIGNAL) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(ChannelError::NoAnswer),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => {
                    return Err(ChannelError::Closed);
                }
                Err(error) => return Err(ChannelError::System(error)),
            }
        }
        self.last = self.last.wrapping_add(1);
        self.awaited.push_back(id);
        Ok(())
    }

    /// Waits for the oldest request's answer.
    pub(super) fn receive(&mut self) -> Result<CopyAnswer, ChannelError> {
        let mut packet = [0; ANSWER + 1];
        let count = loop {
            match rustix::net::recv(&self.socket, &mut packet, RecvFlags::empty()) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Err(ChannelError::Closed),
                Ok((_, count)) => break count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(ChannelError::NoAnswer),
                Err(error) => return Err(ChannelError::System(error)),
            }
        };
        let answer =
            packet.get(..count).and_then(CopyAnswer::decode).ok_or(ChannelError::Closed)?;
        let expected = self.awaited.pop_front();
        if expected == Some(answer.id) { Ok(answer) } else { Err(ChannelError::Closed) }
    }

    /// Waits for the answers to abandoned requests: until then the broker may write to the buffer.
    pub(super) fn settle(&mut self) -> Result<(), ChannelError> {
        while !self.awaited.is_empty() {
            self.receive()?;
        }
        Ok(())
    }

    /// Copies bytes out of the buffer.
    pub(super) fn load(&self, at: usize, to: &mut [u8]) -> Result<(), ChannelError> {
        self.buffer.load(at, to).map_err(ChannelError::System)
    }

    /// Copies bytes into the buffer.
    pub(super) fn store(&self, at: usize, from: &[u8]) -> Result<(), ChannelError> {
        self.buffer.store(at, from).map_err(ChannelError::System)
    }
}

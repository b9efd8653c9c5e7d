// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies of memory that is private to its VMM, made by the broker.
//!
//! [`super::HostView`] has a [`Copier`] if its target's RAM cannot be mapped. A view has up to
//! [`CHANNELS`] channels. A batch of pieces is split into parcels, which are sent on all channels
//! that no other thread uses at that moment: the broker fills some while this process copies out of
//! others.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use kvmmem_proto::copy::{CopyAnswer, MAX_PIECES, Piece, SLOT, Status};
use rustix::io::Errno;

use super::channel::{Channel, ChannelError};

/// Number of channels that a view opens, if the broker's limit allows it.
pub(super) const CHANNELS: usize = 2;

/// The most bytes that one request asks for. Small enough that the first answer of a batch comes
/// soon.
const PARCEL: usize = 64 << 10;
const _: () = assert!(PARCEL <= SLOT);

/// How long the event of a view's end may take after the broker has refused a copy because of it.
const NEWS_LIMIT: Duration = Duration::from_secs(1);

/// Why nothing was copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The grant was revoked.
    #[error("the grant was revoked")]
    Revoked,
    /// The target has exited, or the broker.
    #[error("the target, or the broker, has exited")]
    Gone,
    /// The view does not reach the address, or not any more.
    #[error("the view does not reach the address")]
    Hole,
    /// The view is read-only.
    #[error("the view is read-only")]
    ReadOnly,
    /// The VMM has no memory there.
    #[error("the VMM has no memory there")]
    NoMemory,
    /// The view is being changed; the same copy may succeed soon.
    #[error("the view is being changed; try again")]
    Busy,
    /// The broker did not answer in time.
    #[error("the broker did not answer in time")]
    NoAnswer,
    /// The system refused.
    #[error("cannot use the channel to the broker")]
    Channel(#[source] Errno),
}

/// A copy of several pieces that failed at one of them.
#[derive(Debug)]
pub struct PartialCopy {
    /// Index of the first piece that was not copied completely.
    pub piece: usize,
    /// Number of its bytes that were copied.
    pub bytes: usize,
    /// Why.
    pub error: CopyError,
}

/// Copies a view's memory by asking the broker. All methods may be called by many threads at once.
///
/// [`super::HostLink::wait`] receives the view's end: a thread must be waiting there.
#[derive(Debug)]
pub struct Copier {
    /// At least one.
    channels: Vec<Mutex<Channel>>,
    /// Which channel is tried first.
    turn: AtomicUsize,
    ended: Arc<ViewEnd>,
}

/// How a view has ended, and the sockets to close then.
#[derive(Debug, Default)]
pub(super) struct ViewEnd {
    end: Mutex<Option<End>>,
    changed: Condvar,
    sockets: Mutex<Vec<Arc<OwnedFd>>>,
}

/// How the view has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Revoked,
    Gone,
}

/// A part of a piece, in a request.
struct Part {
    piece: usize,
    offset: usize,
    len: usize,
}

/// A request that was sent: its channel's number, its place in the buffer, its parts.
struct Parcel {
    channel: usize,
    at: usize,
    parts: Vec<Part>,
}

impl ViewEnd {
    /// Ends the copies that wait, and all later ones.
    pub(super) fn set(&self, end: End) {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
        self.changed.notify_all();
        for socket in self.sockets.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // Fails only if the broker has closed the socket.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
    }

    /// Waits for the event of the view's end, which the broker's refusal or silence preceded.
    fn wait(&self) -> CopyError {
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(end, NEWS_LIMIT, |end| end.is_none());
        let end = *waited.unwrap_or_else(PoisonError::into_inner).0;
        end.unwrap_or(End::Gone).into()
    }
}

impl From<End> for CopyError {
    fn from(end: End) -> Self {
        match end {
            End::Revoked => Self::Revoked,
            End::Gone => Self::Gone,
        }
    }
}

impl Copier {
    /// Copies over these channels, at least one.
    pub(super) fn new(channels: Vec<Channel>, ended: Arc<ViewEnd>) -> Self {
        let sockets = channels.iter().map(Channel::socket).collect();
        *ended.sockets.lock().unwrap_or_else(PoisonError::into_inner) = sockets;
        let channels = channels.into_iter().map(Mutex::new).collect();
        Self { channels, turn: AtomicUsize::new(0), ended }
    }

    /// Copies guest-physical memory at `gpa` into `bytes`, up to the first hole. Returns the number
    /// of bytes; 0 only if `bytes` is empty.
    ///
    /// ```no_run
    /// # use kvmmem::host::{Copier, CopyError};
    /// # fn example(copier: &Copier) -> Result<(), CopyError> {
    /// let mut bytes = [0; 4096];
    /// let count = copier.read(0x10_0000, &mut bytes)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`CopyError`].
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<usize, CopyError> {
        let len = bytes.len();
        as_far(len, self.read_pieces(&mut [(gpa, bytes)]))
    }

    /// Reads each piece at its guest-physical address, in order. Pieces after the one that
    /// [`PartialCopy`] names may be filled or not.
    ///
    /// ```no_run
    /// # use kvmmem::host::{Copier, PartialCopy};
    /// # fn example(copier: &Copier) -> Result<(), PartialCopy> {
    /// let (mut table, mut task) = ([0; 4096], [0; 512]);
    /// copier.read_pieces(&mut [(0x20_0000, &mut table[..]), (0x41_3000, &mut task[..])])?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`PartialCopy`] with the first piece that was not read.
    pub fn read_pieces(&self, pieces: &mut [(u64, &mut [u8])]) -> Result<(), PartialCopy> {
        let places: Vec<(u64, usize)> =
            pieces.iter().map(|(gpa, bytes)| (*gpa, bytes.len())).collect();
        self.copy(&places, false, |channel, at, part, len| {
            let bytes =
                pieces.get_mut(part.piece).map(|(_, bytes)| &mut **bytes).unwrap_or_default();
            let bytes = bytes.get_mut(part.offset..part.offset + len).unwrap_or_default();
            channel.load(at, bytes)
        })
    }

    /// Copies `bytes` to guest-physical memory at `gpa`, up to the first hole. Returns the number
    /// of bytes; 0 only if `bytes` is empty.
    ///
    /// ```no_run
    /// # use kvmmem::host::{Copier, CopyError};
    /// # fn example(copier: &Copier) -> Result<(), CopyError> {
    /// let count = copier.write(0x10_0000, b"patched")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`CopyError`].
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<usize, CopyError> {
        let copied = self.copy(&[(gpa, bytes.len())], true, |channel, at, part, len| {
            channel.store(at, bytes.get(part.offset..part.offset + len).unwrap_or_default())
        });
        as_far(bytes.len(), copied)
    }

    /// Copies pieces. `local` copies a part's first bytes between the buffer and the caller's
    /// memory.
    fn copy(
        &self,
        pieces: &[(u64, usize)],
        write: bool,
        mut local: impl FnMut(&Channel, usize, &Part, usize) -> Result<(), ChannelError>,
    ) -> Result<(), PartialCopy> {
        let sum = pieces.iter().fold(0usize, |sum, (_, len)| sum.saturating_add(*len));
        let stopped = |piece, bytes, error| PartialCopy { piece, bytes, error: self.error(error) };
        let mut channels = self.lock(sum).map_err(|error| stopped(0, 0, error))?;
        let count = channels.len();
        let (mut sent, mut cursor) = (VecDeque::new(), Cursor::default());
        let mut number = 0;
        loop {
            // Writes are sent one by one: those after a hole must not be carried out.
            while !write || sent.is_empty() {
                let Some(channel) = channels.get_mut(number % count) else { break };
                let Some(at) = channel.free_slot() else { break };
                let parts = cursor.parcel(pieces);
                let Some(first) = parts.first() else { break };
                let (piece, offset) = (first.piece, first.offset);
                let mut place = at;
                for part in parts.iter().filter(|_| write) {
                    local(channel, place, part, part.len)
                        .map_err(|error| stopped(piece, offset, error))?;
                    place += part.len;
                }
                let named = parts.iter().filter_map(|part| {
                    let (gpa, _) = pieces.get(part.piece)?;
                    let gpa = gpa.saturating_add(part.offset as u64);
                    Some(Piece { gpa, len: u32::try_from(part.len).ok()? })
                });
                channel
                    .send(write, named.collect())
                    .map_err(|error| stopped(piece, offset, error))?;
                sent.push_back(Parcel { channel: number % count, at, parts });
                number += 1;
            }
            let Some(Parcel { channel, at, parts }) = sent.pop_front() else { return Ok(()) };
            let (piece, offset) = parts.first().map_or((0, 0), |part| (part.piece, part.offset));
            let Some(channel) = channels.get_mut(channel) else { return Ok(()) };
            let answer = channel.receive().map_err(|error| stopped(piece, offset, error))?;
            let mut place = at;
            for (number, part) in parts.iter().enumerate() {
                let len = copied(&answer, number, part);
                if !write && len > 0 {
                    local(channel, place, part, len)
                        .map_err(|error| stopped(part.piece, part.offset, error))?;
                }
                if len < part.len {
                    let error = self.refused(answer.status);
                    return Err(PartialCopy { piece: part.piece, bytes: part.offset + len, error });
                }
                place += part.len;
            }
        }
    }

    /// A channel that is free, or the first one that gets so; for more than a parcel all others
    /// that are free as well.
    fn lock(&self, sum: usize) -> Result<Vec<MutexGuard<'_, Channel>>, ChannelError> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let in_turn = || {
            self.channels.iter().cycle().skip(turn % self.channels.len()).take(self.channels.len())
        };
        let most = if sum > PARCEL { self.channels.len() } else { 1 };
        let mut locked: Vec<MutexGuard<'_, Channel>> = in_turn()
            .filter_map(|channel| match channel.try_lock() {
                Ok(channel) => Some(channel),
                Err(TryLockError::Poisoned(channel)) => Some(channel.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            })
            .take(most)
            .collect();
        if locked.is_empty() {
            let first = in_turn()
                .next()
                .map(|channel| channel.lock().unwrap_or_else(PoisonError::into_inner));
            locked.extend(first);
        }
        if locked.is_empty() {
            return Err(ChannelError::Closed);
        }
        locked.iter_mut().try_for_each(|channel| channel.settle())?;
        Ok(locked)
    }

    fn error(&self, error: ChannelError) -> CopyError {
        match error {
            ChannelError::Closed => self.ended.wait(),
            ChannelError::NoAnswer => CopyError::NoAnswer,
            ChannelError::System(errno) => CopyError::Channel(errno),
        }
    }

    fn refused(&self, status: Status) -> CopyError {
        match status {
            // An answer that says that all is done, and names less.
            Status::Done | Status::Ended => self.ended.wait(),
            Status::Hole => CopyError::Hole,
            Status::ReadOnly => CopyError::ReadOnly,
            Status::NoMemory => CopyError::NoMemory,
            Status::Busy => CopyError::Busy,
        }
    }
}

/// Where the next parcel of a batch begins.
#[derive(Default)]
struct Cursor {
    piece: usize,
    offset: usize,
}

impl Cursor {
    /// The parts of the next parcel; none at the end.
    fn parcel(&mut self, pieces: &[(u64, usize)]) -> Vec<Part> {
        let (mut parts, mut left) = (Vec::new(), PARCEL);
        while let Some((_, whole)) = pieces.get(self.piece)
            && left > 0
            && parts.len() < MAX_PIECES
        {
            let len = (whole - self.offset).min(left);
            if len > 0 {
                parts.push(Part { piece: self.piece, offset: self.offset, len });
            }
            left -= len;
            self.offset += len;
            if self.offset == *whole {
                (self.piece, self.offset) = (self.piece + 1, 0);
            }
        }
        parts
    }
}

/// How many bytes of a request's part an answer says are copied.
fn copied(answer: &CopyAnswer, number: usize, part: &Part) -> usize {
    let word = |word: u32| usize::try_from(word).unwrap_or(0);
    match word(answer.pieces).cmp(&number) {
        std::cmp::Ordering::Greater => part.len,
        std::cmp::Ordering::Equal => word(answer.bytes).min(part.len),
        std::cmp::Ordering::Less => 0,
    }
}

/// How many of `len` bytes were copied, at least one.
fn as_far(len: usize, copied: Result<(), PartialCopy>) -> Result<usize, CopyError> {
    match copied {
        Ok(()) => Ok(len),
        Err(PartialCopy { bytes, .. }) if bytes > 0 => Ok(bytes),
        Err(PartialCopy { error, .. }) => Err(error),
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies of memory that nobody but its VMM can map, asked of the broker.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::LIMIT;
use crate::packet::{PacketError, PacketSocket, Wait};
use crate::wire::{Call, MAX_COPY, Refusal, Request};

/// How long the news of a view's end may take after the broker has refused a copy because of it.
const NEWS_LIMIT: Duration = Duration::from_secs(1);

/// Why nothing was copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The grant was taken back.
    #[error("the grant was taken back")]
    Revoked,
    /// The target is gone, or the broker.
    #[error("the target, or the broker, is gone")]
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
    /// The broker gave another reason.
    #[error("the broker refused to copy: {0}")]
    Refused(String),
    /// The broker did not answer in time.
    #[error("the broker gave no answer")]
    NoAnswer,
    /// The request could not be sent.
    #[error("cannot ask the broker for a copy")]
    Packet(#[source] PacketError),
    /// There is no memory to copy by way of.
    #[error("cannot make or use the memory that is copied by way of")]
    Buffer(#[source] Errno),
}

/// Copies a view's memory by asking the broker; one copy at a time, whichever threads call.
///
/// The answers come to [`super::HostLink::wait`]: a thread must be waiting there.
#[derive(Debug)]
pub struct Copier {
    socket: Arc<PacketSocket>,
    view: u64,
    answers: Arc<Answers>,
    /// What is copied by way of. Taken while a copy is under way, and lost with one that was not answered: the broker may
    /// still use it.
    buffer: Mutex<Option<OwnedFd>>,
}

/// Where the one who takes packets leaves the answer for the one who waits.
#[derive(Debug, Default)]
pub(super) struct Answers {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The request that waits.
    waiting: Option<u64>,
    answer: Option<Result<u32, (Refusal, String)>>,
    last: u64,
    end: Option<End>,
}

/// How the view has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Revoked,
    Gone,
}

impl Answers {
    /// Hands in an answer; one that nobody waits for is dropped.
    pub(super) fn hand_in(&self, id: u64, answer: Result<u32, (Refusal, String)>) {
        let mut state = self.lock();
        if state.waiting == Some(id) {
            state.answer = Some(answer);
            self.changed.notify_all();
        }
    }

    /// Ends the copy that waits, and all to come.
    pub(super) fn end(&self, end: End) {
        self.lock().end.get_or_insert(end);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces a request; returns its id.
    fn begin(&self) -> Result<u64, CopyError> {
        let mut state = self.lock();
        if let Some(end) = state.end {
            return Err(end.into());
        }
        // The first one was the attach.
        state.last = state.last.max(1) + 1;
        state.waiting = Some(state.last);
        state.answer = None;
        Ok(state.last)
    }

    fn wait(&self) -> Result<u32, CopyError> {
        let deadline = Instant::now() + LIMIT;
        let mut state = self.until(deadline, |state| state.answer.is_some());
        state.waiting = None;
        if let Some(end) = state.end {
            return Err(end.into());
        }
        match state.answer.take() {
            Some(Ok(len)) => Ok(len),
            Some(Err((Refusal::Unknown, _))) => {
                drop(state);
                let state = self.until(Instant::now() + NEWS_LIMIT, |_| false);
                Err(state.end.unwrap_or(End::Gone).into())
            }
            Some(Err((Refusal::Invalid, _))) => Err(CopyError::Hole),
            Some(Err((Refusal::Denied, _))) => Err(CopyError::ReadOnly),
            Some(Err((_, message))) => Err(CopyError::Refused(message)),
            None => Err(CopyError::NoAnswer),
        }
    }

    /// Waits for something, or the view's end.
    fn until(&self, deadline: Instant, is_there: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let left = deadline.saturating_duration_since(Instant::now());
        let waits = |state: &mut State| state.end.is_none() && !is_there(state);
        let waited = self.changed.wait_timeout_while(self.lock(), left, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0
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
    pub(super) fn new(socket: Arc<PacketSocket>, view: u64, answers: Arc<Answers>) -> Self {
        Self { socket, view, answers, buffer: Mutex::default() }
    }

    /// Copies memory from guest-physical address `gpa` on to `bytes`, at most 1 MiB and what is in one piece; returns how
    /// many bytes, none only where `bytes` is empty.
    ///
    /// # Errors
    /// [`CopyError`].
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<usize, CopyError> {
        let most = bytes.len().min(MAX_COPY);
        let Some(part) = bytes.get_mut(..most).filter(|part| !part.is_empty()) else { return Ok(0) };
        self.copy(
            gpa,
            most,
            false,
            |_| Ok(()),
            |buffer, len| {
                let mut rest = part.get_mut(..len).unwrap_or_default();
                let mut at = 0;
                while !rest.is_empty() {
                    let count = moved(rustix::io::pread(buffer, &mut *rest, at))?;
                    rest = rest.get_mut(count..).unwrap_or_default();
                    at += count as u64;
                }
                Ok(())
            },
        )
    }

    /// Copies `bytes`, at most 1 MiB and what fits in one piece, to guest-physical address `gpa` on; returns how many
    /// bytes, none only where `bytes` is empty.
    ///
    /// # Errors
    /// [`CopyError`].
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<usize, CopyError> {
        let most = bytes.len().min(MAX_COPY);
        let Some(part) = bytes.get(..most).filter(|part| !part.is_empty()) else { return Ok(0) };
        let fill = |buffer: &OwnedFd| {
            let (mut rest, mut at) = (part, 0);
            while !rest.is_empty() {
                let count = moved(rustix::io::pwrite(buffer, rest, at))?;
                rest = rest.get(count..).unwrap_or_default();
                at += count as u64;
            }
            Ok(())
        };
        self.copy(gpa, most, true, fill, |_, _| Ok(()))
    }

    fn copy(
        &self,
        gpa: u64,
        len: usize,
        write: bool,
        before: impl FnOnce(&OwnedFd) -> Result<(), Errno>,
        after: impl FnOnce(&OwnedFd, usize) -> Result<(), Errno>,
    ) -> Result<usize, CopyError> {
        let mut kept = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = kept.take().map_or_else(memory, Ok).map_err(CopyError::Buffer)?;
        allocate(&buffer, len).and_then(|()| before(&buffer)).map_err(CopyError::Buffer)?;
        let id = self.answers.begin()?;
        let call = Call::Copy { view: self.view, gpa, len: u32::try_from(len).unwrap_or(0), write };
        let sent = self.socket.send(&Request { id, call }, &[buffer.as_fd()], Wait::Limited);
        sent.map_err(CopyError::Packet)?;
        let copied = self.answers.wait();
        // Whatever it says, the broker is done with the buffer.
        if !matches!(copied, Err(CopyError::NoAnswer | CopyError::Revoked | CopyError::Gone)) {
            let buffer = kept.insert(buffer);
            let count = usize::try_from(copied?).unwrap_or(0).min(len);
            after(buffer, count).map_err(CopyError::Buffer)?;
            return if count == 0 { Err(CopyError::NoMemory) } else { Ok(count) };
        }
        Err(copied.err().unwrap_or(CopyError::NoAnswer))
    }
}

fn memory() -> Result<OwnedFd, Errno> {
    let file = rustix::fs::memfd_create("kvmmem-copy", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, MAX_COPY as u64)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// The broker writes to no memory that it would have to pay for.
fn allocate(buffer: &OwnedFd, len: usize) -> Result<(), Errno> {
    loop {
        match rustix::fs::fallocate(buffer, FallocateFlags::KEEP_SIZE, 0, len as u64) {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

fn moved(result: Result<usize, Errno>) -> Result<usize, Errno> {
    match result {
        Ok(0) => Err(Errno::IO),
        Err(Errno::INTR) => Ok(0),
        result => result,
    }
}

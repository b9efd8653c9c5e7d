// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lines over a stream socket, each way with a deadline.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use kvmmem_proto::timed;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recv, recvmsg,
};

use super::error::QmpError;

/// The most that is read for one command, bytes. A memory tree of some 100 devices has 200 KiB.
pub(crate) const MAX_RECEIVED: usize = 8 * 1024 * 1024;

/// The most that is read of a line that answers no command, or one whose answer is short, bytes.
pub(crate) const MAX_SHORT: usize = 256 * 1024;

/// How much is read at a time, and kept of the buffer between lines, bytes.
const CHUNK: usize = 16 * 1024;

const FILE: &str = "it sent a file, which QMP does not have";

/// A connected stream, and what was received after the last line.
#[derive(Debug)]
pub(crate) struct Lines {
    stream: Arc<OwnedFd>,
    buffer: Vec<u8>,
    /// Where in the buffer the next line begins.
    start: usize,
    /// Up to where in the buffer there is no end of that line.
    searched: usize,
    received: usize,
    /// The most that may be received.
    most: usize,
}

/// Why there is no line.
#[derive(Debug)]
pub(crate) enum LineError {
    /// Nothing came in time, or nothing was taken.
    Silent,
    /// More bytes came than may.
    TooMuch,
    /// The stream failed or ended.
    Io(io::Error),
}

impl LineError {
    /// What it means for a connection to QEMU.
    pub(crate) fn of(self, path: &Path) -> QmpError {
        let path = path.to_owned();
        match self {
            Self::Silent => QmpError::Silent(path),
            Self::TooMuch => QmpError::TooMuch(path),
            Self::Io(source) => QmpError::Connection { path, source },
        }
    }
}

impl Lines {
    pub(crate) fn new(stream: OwnedFd) -> Self {
        let stream = Arc::new(stream);
        Self { stream, buffer: Vec::new(), start: 0, searched: 0, received: 0, most: MAX_RECEIVED }
    }

    pub(crate) fn stream(&self) -> &Arc<OwnedFd> {
        &self.stream
    }

    /// Lets `most` bytes come from now on.
    pub(crate) fn begin(&mut self, most: usize) {
        (self.received, self.most) = (self.buffer.len() - self.start, most);
    }

    /// Sends a text, with a file descriptor beside it.
    pub(crate) fn send(
        &mut self,
        mut text: &[u8],
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<(), LineError> {
        let mut fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        while !text.is_empty() {
            self.wait(PollFlags::OUT, deadline)?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                // There is room: the space is made for one.
                let _ = control.push(SendAncillaryMessage::ScmRights(&fds));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(&self.stream, &[IoSlice::new(text)], &mut control, flags) {
                Ok(count) => {
                    text = text.get(count..).unwrap_or_default();
                    fds.clear();
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(LineError::Io(error.into())),
            }
        }
        Ok(())
    }

    /// The next line; the newline is part of it. What has come of it until the deadline is kept.
    pub(crate) fn next(&mut self, deadline: Instant) -> Result<Vec<u8>, LineError> {
        let mut has_looked = false;
        loop {
            let unsearched = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(end) = unsearched.iter().position(|byte| *byte == b'\n') {
                let end = self.searched + end + 1;
                let line = self.buffer.get(self.start..end).unwrap_or_default().to_vec();
                (self.start, self.searched) = (end, end);
                return Ok(line);
            }
            // No more than the beginning of a line is left.
            if self.start > 0 {
                self.buffer.drain(..self.start);
                self.buffer.shrink_to(CHUNK);
                self.start = 0;
            }
            self.searched = self.buffer.len();
            // Once in any case: what has come already is not late.
            if has_looked && Instant::now() >= deadline {
                return Err(LineError::Silent);
            }
            has_looked = true;
            self.wait(PollFlags::IN, deadline)?;
            let mut chunk = [0; CHUNK];
            let count = match self.receive(&mut chunk) {
                Ok(0) => return Err(LineError::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => count,
                Err(Errno::INTR | Errno::AGAIN) => continue,
                Err(Errno::NOMSG) => return Err(LineError::Io(io::Error::other(FILE))),
                Err(error) => return Err(LineError::Io(error.into())),
            };
            self.received += count;
            if self.received > self.most {
                return Err(LineError::TooMuch);
            }
            self.buffer.extend_from_slice(chunk.get(..count).unwrap_or_default());
        }
    }

    /// Receives what has come. Who receives data closes the files that come with it, and the close
    /// of a file may block for as long as its sender likes: data with files is left where it is.
    ///
    /// # Errors
    /// `NOMSG` where files have come.
    fn receive(&self, chunk: &mut [u8]) -> Result<usize, Errno> {
        let mut files = RecvAncillaryBuffer::default();
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let seen = recvmsg(&self.stream, &mut [IoSliceMut::new(chunk)], &mut files, flags)?;
        // There is no room for files.
        if seen.flags.contains(ReturnFlags::CTRUNC) {
            return Err(Errno::NOMSG);
        }
        let chunk = chunk.get_mut(..seen.bytes).unwrap_or_default();
        recv(&self.stream, chunk, RecvFlags::DONTWAIT).map(|(_, count)| count)
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<(), LineError> {
        timed::wait(self.stream.as_fd(), flags, deadline).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => LineError::Silent,
            _ => LineError::Io(error),
        })
    }
}

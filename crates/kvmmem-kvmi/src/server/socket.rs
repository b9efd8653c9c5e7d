// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A connection over a socket, and a thread that serves one tool.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::connection::{Connection, Limits, Turn, Workspace};
use super::error::ServeError;
use crate::dispatch::TargetVm;

/// Greets the tool and serves it until it closes.
///
/// # Errors
/// Why the connection had to end before the tool closed it.
pub fn serve(stream: &impl AsFd, vm: &impl TargetVm) -> Result<(), ServeError> {
    serve_within(Limits::default(), stream, vm)
}

/// As [`serve`], with other limits than the protocol's usual ones.
///
/// # Errors
/// Why the connection had to end before the tool closed it.
pub fn serve_within(
    limits: Limits,
    stream: &impl AsFd,
    vm: &impl TargetVm,
) -> Result<(), ServeError> {
    let mut connection = Connection::new(vm, limits);
    let mut space = Workspace::default();
    loop {
        let socket = &mut Socket { fd: stream.as_fd(), waits: false };
        let (flags, deadline) = match connection.turn(socket, vm, &mut space)? {
            Turn::More => continue,
            Turn::Read(deadline) => (PollFlags::IN, deadline),
            Turn::Write(deadline) => (PollFlags::OUT, Some(deadline)),
            Turn::Closed => return Ok(()),
        };
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::new(stream, flags)], left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(connection.late(error.into())),
        }
    }
}

/// A connected stream socket, for one turn.
#[derive(Debug)]
pub struct Socket<'a> {
    /// The socket.
    pub fd: BorrowedFd<'a>,
    /// Whether reads wait, for the time in the socket's options.
    pub waits: bool,
}

impl Read for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let flags = if self.waits { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        Ok(recv(self.fd, buffer, flags).map(|(count, _)| count)?)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

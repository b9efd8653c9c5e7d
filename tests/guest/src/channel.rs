// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A connected socket that carries frames, with a deadline for each wait.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::frame::{self, Decoder, Frame, Kind};

/// One end of a connection.
#[derive(Debug)]
pub struct Channel {
    // A socket is read and written as a file: vsock and unix sockets alike.
    file: File,
    decoder: Decoder,
}

impl Channel {
    /// Takes a connected stream socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { file: File::from(socket), decoder: Decoder::default() }
    }

    /// A second handle to write with, while the first one waits for frames.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn writer(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Limits how long a write may wait for the peer to read.
    ///
    /// # Errors
    /// As setsockopt's.
    pub fn set_write_timeout(&self, limit: Duration) -> io::Result<()> {
        Ok(set_socket_timeout(&self.file, Timeout::Send, Some(limit))?)
    }

    /// Sends `bytes` as frames of `kind`.
    ///
    /// # Errors
    /// As the socket's; `TimedOut` when the peer does not read.
    pub fn send(&mut self, kind: Kind, bytes: &[u8]) -> io::Result<()> {
        frame::write(&mut self.file, kind, bytes).map_err(timed_out)
    }

    /// Waits for the next frame, until `deadline` if there is one; `None` when the peer has closed.
    ///
    /// # Errors
    /// As the socket's; `TimedOut` at the deadline, `InvalidData` when the peer does not send
    /// frames.
    pub fn receive(&mut self, deadline: Option<Instant>) -> io::Result<Option<Frame>> {
        frame::read(&mut DeadlineReader { file: &self.file, deadline }, &mut self.decoder)
            .map_err(timed_out)
    }

    /// Ends what this side sends, and passes over what still comes until the peer has closed, at
    /// most until `deadline`.
    pub fn finish(&mut self, deadline: Instant) {
        // It fails only if the peer has closed already.
        let _ = rustix::net::shutdown(&self.file, rustix::net::Shutdown::Write);
        while let Ok(Some(_)) = self.receive(Some(deadline)) {}
        self.shutdown();
    }

    /// Closes both directions, for all handles of this socket.
    pub fn shutdown(&self) {
        // It fails only if the peer has closed already.
        let _ = rustix::net::shutdown(&self.file, rustix::net::Shutdown::Both);
    }
}

/// Writes a frame by a shared handle.
pub(crate) fn send(file: &std::sync::Mutex<File>, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let mut file = file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    frame::write(&mut *file, kind, bytes).map_err(timed_out)
}

/// Reads with what is left of the deadline as the socket's limit.
struct DeadlineReader<'a> {
    file: &'a File,
    deadline: Option<Instant>,
}

impl Read for DeadlineReader<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Below one microsecond the kernel's limit would be zero, which means no limit.
        set_socket_timeout(
            self.file,
            Timeout::Recv,
            left.map(|left| left.max(Duration::from_micros(10))),
        )?;
        let mut file = self.file;
        file.read(bytes)
    }
}

fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

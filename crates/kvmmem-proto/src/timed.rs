// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sockets with a deadline.

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// A connected stream socket whose reads and writes must all be over by one point in time, however
/// slowly the bytes trickle in.
#[derive(Debug)]
pub struct TimedSocket<'a> {
    socket: BorrowedFd<'a>,
    deadline: Instant,
}

impl<'a> TimedSocket<'a> {
    /// The socket until `deadline`.
    pub fn new(socket: BorrowedFd<'a>, deadline: Instant) -> Self {
        Self { socket, deadline }
    }
}

/// Waits until something can be done with a file descriptor. Where the deadline has passed, it
/// looks without waiting.
///
/// # Errors
/// `TimedOut`, and those of `poll`.
pub fn wait(fd: BorrowedFd<'_>, what: PollFlags, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::from_borrowed_fd(fd, what)], Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl Read for TimedSocket<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            wait(self.socket, PollFlags::IN, self.deadline)?;
            match recv(self.socket, &mut *buf, RecvFlags::DONTWAIT) {
                Ok((count, _)) => return Ok(count),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Write for TimedSocket<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        loop {
            wait(self.socket, PollFlags::OUT, self.deadline)?;
            match send(self.socket, buf, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => return Ok(count),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    #[test]
    fn trickling_bytes_do_not_prolong_it() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            while theirs.write_all(&[0]).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let mut timed = TimedSocket::new(ours.as_fd(), Instant::now() + Duration::from_millis(60));
        let error = timed.read_exact(&mut [0; 1 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(ours);
        writer.join().unwrap();
    }

    #[test]
    fn a_peer_that_does_not_read_is_given_up() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut timed = TimedSocket::new(ours.as_fd(), Instant::now() + Duration::from_millis(30));
        let error = timed.write_all(&vec![0; 4 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}

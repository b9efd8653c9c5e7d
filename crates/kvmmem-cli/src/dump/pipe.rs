// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file that a dump is written to as a stream. Where that is a pipe whose reader does not read, a
//! signal ends the wait, and a limit while the target is paused.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::PIPE_BUF;

use crate::interrupt::Interrupt;

/// Bytes that a pipe is made to hold: as many as users may have by default.
const CAPACITY: usize = 1 << 20;

/// An open file, and the signals that end a wait for it.
pub(super) struct Pipe {
    file: File,
    /// Of a pipe, the same one opened anew, so that it takes what fits and does not wait for the
    /// rest: `file` may be others' as well, and so is not made non-blocking.
    nonblocking: Option<File>,
    /// For pipes alone: no other file is known to take a part of a write whenever poll reports it
    /// writable.
    interrupt: Option<Interrupt>,
    /// How long the reader may leave the pipe full.
    limit: Option<Duration>,
}

impl Pipe {
    /// A file that is written to from now on.
    pub(super) fn new(
        file: File,
        interrupt: &Interrupt,
        limit: Option<Duration>,
    ) -> io::Result<Self> {
        let is_pipe = file.metadata()?.file_type().is_fifo();
        let nonblocking = is_pipe.then(|| open_again(&file)).transpose().ok().flatten();
        if is_pipe {
            // Only the speed depends on it.
            let _ = rustix::pipe::fcntl_setpipe_size(&file, CAPACITY);
        }
        Ok(Self { file, nonblocking, interrupt: is_pipe.then(|| interrupt.clone()), limit })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(interrupt) = &self.interrupt else { return self.file.write(bytes) };
        let limit = self.limit.and_then(|limit| Timespec::try_from(limit).ok());
        loop {
            let mut fds =
                [PollFd::new(&self.file, PollFlags::OUT), PollFd::new(interrupt, PollFlags::IN)];
            match poll(&mut fds, limit.as_ref()) {
                Ok(0) => {
                    let limit = self.limit.unwrap_or_default();
                    let words = format!(
                        "the pipe was full for {limit:?} while the target was paused: is it read?"
                    );
                    return Err(io::Error::new(io::ErrorKind::TimedOut, words));
                }
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let [file, signal] = fds.map(|fd| !fd.revents().is_empty());
            if signal {
                // Not as ErrorKind::Interrupted, after which callers try again.
                return Err(io::Error::other("interrupted"));
            }
            match &self.nonblocking {
                _ if !file => {}
                // So much a pipe takes at once that can be written (pipe(7)).
                None => return self.file.write(bytes.get(..PIPE_BUF).unwrap_or(bytes)),
                Some(pipe) => match (&*pipe).write(bytes) {
                    // Another writer was quicker.
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    written => return written,
                },
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Opens a pipe anew. Fails where it is another user's, or /proc is not there.
fn open_again(pipe: &File) -> io::Result<File> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let path = format!("/proc/self/fd/{}", pipe.as_fd().as_raw_fd());
    File::options().write(true).custom_flags(flags).open(path)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn a_pipe_takes_all_that_fits_and_its_file_stays_as_it_is() {
        let (mut reader, writer) = io::pipe().unwrap();
        let (file, other) = (
            File::from(OwnedFd::from(writer.try_clone().unwrap())),
            File::from(OwnedFd::from(writer)),
        );
        let mut pipe = Pipe::new(file, &Interrupt::never(), None).unwrap();
        let bytes: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 3).to_le_bytes()[0]).collect();
        assert!(pipe.write(&bytes).unwrap() > PIPE_BUF);
        assert!(!rustix::fs::fcntl_getfl(&other).unwrap().contains(OFlags::NONBLOCK));
        drop(other);
        let expected = bytes.clone();
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            let begun = all.len() - expected.len();
            assert!(all[begun..] == expected && all[..begun] == expected[..begun]);
        });
        pipe.write_all(&bytes).unwrap();
        drop(pipe);
        read.join().unwrap();
    }

    #[test]
    fn a_pipe_that_stays_full_is_given_up() {
        let (mut reader, writer) = io::pipe().unwrap();
        let limit = Some(Duration::from_millis(20));
        let mut pipe =
            Pipe::new(File::from(OwnedFd::from(writer)), &Interrupt::never(), limit).unwrap();
        let mut written = 0;
        let error = loop {
            match pipe.write(&[7; 1 << 16]) {
                Ok(count) => written += count,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        assert!(error.to_string().contains("is it read?"), "{error}");
        drop(pipe);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, vec![7; written]);
    }
}

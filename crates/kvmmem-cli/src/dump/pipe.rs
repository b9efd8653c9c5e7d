// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file that a dump is written to as a stream. Where that is a pipe whose reader does not read, a
//! signal ends the wait, and a limit while the target is paused.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::PIPE_BUF;

use crate::interrupt::Interrupt;

/// An open file, and the signals that end a wait for it.
pub(super) struct Pipe {
    file: File,
    /// Of a pipe alone: nothing else is known to take a part of what is written whenever poll says
    /// that it can be written.
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
        Ok(Self { file, interrupt: is_pipe.then(|| interrupt.clone()), limit })
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
            if file {
                // So much a pipe takes at once that can be written (pipe(7)); the file is not made
                // non-blocking, as it may be others' as well.
                return self.file.write(bytes.get(..PIPE_BUF).unwrap_or(bytes));
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

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

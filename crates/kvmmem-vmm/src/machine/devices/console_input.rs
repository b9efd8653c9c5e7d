// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Input of the serial port: the thread that reads standard input.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::serial::SerialPort;
use crate::machine::stop::StopHandle;

/// What Ctrl-A began.
#[derive(Default)]
struct Escape {
    pending: bool,
}

impl Escape {
    const CTRL_A: u8 = 1;

    /// Takes `input` and returns what goes to the guest; `None` after Ctrl-A x.
    fn filter(&mut self, input: &[u8]) -> Option<Vec<u8>> {
        let mut passed = Vec::with_capacity(input.len());
        for &byte in input {
            match (std::mem::take(&mut self.pending), byte) {
                (true, b'x' | b'X') => return None,
                (true, _) => passed.push(byte),
                (false, Self::CTRL_A) => self.pending = true,
                (false, _) => passed.push(byte),
            }
        }
        Some(passed)
    }
}

/// The thread that brings standard input to the serial port.
pub(crate) struct ConsoleInput {
    /// An eventfd.
    quit: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl ConsoleInput {
    /// Starts the thread. `stop` ends the machine on Ctrl-A x if standard input is a terminal.
    ///
    /// # Errors
    /// When the process has no descriptor or thread left.
    pub(crate) fn start(port: Arc<Mutex<SerialPort>>, stop: StopHandle) -> io::Result<Self> {
        let quit = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let waiter = quit.try_clone()?;
        let escape = io::stdin().is_terminal().then(Escape::default);
        let thread = std::thread::Builder::new().name("console".into()).spawn(move || {
            pump(waiter.as_fd(), escape, &port, &stop);
        })?;
        Ok(Self { quit, thread: Some(thread) })
    }
}

impl Drop for ConsoleInput {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.quit, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Copies input until it ends or `quit` is written.
fn pump(
    quit: BorrowedFd<'_>,
    mut escape: Option<Escape>,
    port: &Mutex<SerialPort>,
    stop: &StopHandle,
) {
    /// How long to wait for a guest whose FIFO is full.
    const FULL: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
    let stdin = io::stdin();
    let mut pending: Vec<u8> = Vec::new();
    loop {
        let ready = if pending.is_empty() {
            let mut fds = [PollFd::new(&quit, PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
            poll(&mut fds, None).map(|_| (fds[0].revents(), fds[1].revents()))
        } else {
            let mut fds = [PollFd::new(&quit, PollFlags::IN)];
            poll(&mut fds, Some(&FULL)).map(|_| (fds[0].revents(), PollFlags::empty()))
        };
        match ready {
            Err(Errno::INTR) => continue,
            Err(_) => return,
            Ok((quit, _)) if !quit.is_empty() => return,
            Ok((_, input)) if !input.is_empty() => {
                let mut bytes = [0; 64];
                let count = match rustix::io::read(&stdin, &mut bytes) {
                    Ok(0) => return,
                    Ok(count) => count,
                    Err(Errno::INTR | Errno::AGAIN) => continue,
                    Err(_) => return,
                };
                let input = bytes.get(..count).unwrap_or_default();
                pending = match &mut escape {
                    None => input.to_vec(),
                    Some(escape) => match escape.filter(input) {
                        Some(passed) => passed,
                        None => return stop.stop(),
                    },
                };
            }
            Ok(_) => {}
        }
        let taken = port.lock().unwrap_or_else(PoisonError::into_inner).receive(&pending);
        pending.drain(..taken.min(pending.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_ends_and_ctrl_a_ctrl_a_is_one() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ab\x03").unwrap(), b"ab\x03");
        assert_eq!(escape.filter(b"\x01").unwrap(), b"");
        assert_eq!(escape.filter(b"\x01x").unwrap(), b"\x01x");
        assert_eq!(escape.filter(b"q\x01"), Some(b"q".to_vec()));
        assert_eq!(escape.filter(b"x"), None);
    }
}

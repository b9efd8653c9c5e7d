// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Host's side of the serial port: where output goes, and the thread that reads input.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};

use super::serial::SerialPort;
use crate::config::SerialConfig;
use crate::control::StopHandle;

/// Where the guest's output goes.
pub(crate) struct ConsoleOutput {
    sink: Sink,
    stop: StopHandle,
}

enum Sink {
    Stdout,
    File(File),
    Nothing,
}

impl ConsoleOutput {
    /// Opens the output that `config` names.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub(crate) fn open(config: &SerialConfig, stop: StopHandle) -> io::Result<Self> {
        let sink = match config {
            SerialConfig::Stdio => Sink::Stdout,
            SerialConfig::File(path) => Sink::File(File::create(path)?),
            SerialConfig::None => Sink::Nothing,
        };
        Ok(Self { sink, stop })
    }

    /// The same output for the machine's next generation.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let sink = match &self.sink {
            Sink::Stdout => Sink::Stdout,
            Sink::File(file) => Sink::File(file.try_clone()?),
            Sink::Nothing => Sink::Nothing,
        };
        Ok(Self { sink, stop: self.stop.clone() })
    }
}

impl Write for ConsoleOutput {
    /// Blocks as long as the reader of the output does, but not longer than the machine runs: the
    /// signal that calls a vCPU out interrupts the write.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let written = match &self.sink {
                Sink::Stdout => rustix::io::write(io::stdout().as_fd(), bytes),
                Sink::File(file) => rustix::io::write(file, bytes),
                Sink::Nothing => Ok(bytes.len()),
            };
            match written {
                Err(Errno::INTR) if !self.stop.is_ending() => {}
                Err(Errno::INTR) => return Err(io::Error::other("the machine is ending")),
                Err(error) => return Err(error.into()),
                Ok(count) => return Ok(count),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Raw mode of the terminal on standard input, undone on drop.
pub(crate) struct RawTerminal(Termios);

impl RawTerminal {
    /// Sets raw mode; `None` if standard input is not a terminal.
    pub(crate) fn enter() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        // The VMM's own messages still end in newlines alone.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

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

    #[test]
    fn output_goes_to_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("serial");
        let mut output =
            ConsoleOutput::open(&SerialConfig::File(path.clone()), StopHandle::default()).unwrap();
        output.write_all(b"one ").unwrap();
        output.try_clone().unwrap().write_all(b"two").unwrap();
        assert_eq!(std::fs::read(path).unwrap(), b"one two");
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Host's side of the serial port: where output goes, and the terminal's mode.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};

use crate::config::SerialConfig;
use crate::machine::stop::StopHandle;

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

#[cfg(test)]
mod tests {
    use super::*;

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

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host role: runs one program; files have the command and the report.
//!
//! The VM's `/host.json` is a [`Command`]; its output and end go as frames to the first port of the
//! VM's virtio console device, which the machine outside reads.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::sync::{Arc, Mutex};

use crate::frame::{self, Decoder, Kind};
use crate::process;
use crate::request::{Command, ExitStatus};

/// Where the program to run is described.
pub const PROGRAM: &str = "/host.json";

/// The port that the report is written to.
const PORT: &str = "/dev/vport0p1";

/// Runs the program of [`PROGRAM`] and reports it.
///
/// # Errors
/// When it cannot be run or reported.
pub fn run_host() -> io::Result<()> {
    let command: Command = serde_json::from_slice(&fs::read(PROGRAM)?)?;
    let port = Arc::new(Mutex::new(OpenOptions::new().write(true).open(PORT)?));
    let status = match process::start(&command, &port) {
        Ok(running) => {
            running.handle().feed(Vec::new())?;
            running.wait()?
        }
        Err(error) => {
            crate::channel::send(&port, Kind::Stderr, format!("{error}\n").as_bytes())?;
            ExitStatus::Code(127)
        }
    };
    crate::channel::send(&port, Kind::Exit, &serde_json::to_vec(&status)?)
}

/// One piece of a report, as read outside.
#[derive(Debug, PartialEq, Eq)]
pub enum Report {
    /// The program wrote this to its stdout.
    Stdout(Vec<u8>),
    /// The program wrote this to its stderr.
    Stderr(Vec<u8>),
    /// The program ended.
    Exit(ExitStatus),
}

/// Reads the next piece; `None` when the VM has gone without reporting an end.
///
/// # Errors
/// As the stream's; `InvalidData` when it is not a report.
pub fn read(stream: &mut impl Read, decoder: &mut Decoder) -> io::Result<Option<Report>> {
    let Some(frame) = frame::read(stream, decoder)? else { return Ok(None) };
    Ok(Some(match frame.kind {
        Kind::Stdout => Report::Stdout(frame.payload),
        Kind::Stderr => Report::Stderr(frame.payload),
        Kind::Exit => Report::Exit(serde_json::from_slice(&frame.payload)?),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    }))
}

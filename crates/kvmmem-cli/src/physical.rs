// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem read` and `kvmmem write`: a target's memory by copy, over KVMI.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;

use crate::connect::Connect;
use crate::hexdump::Hexdump;
use crate::number::{HexBytes, hex, parse, parse_hex, parse_size};
use crate::output::Output;

/// Bytes that are read before they are printed.
const CHUNK: u64 = 64 * 1024;

#[derive(Args)]
pub(crate) struct Read {
    /// First guest-physical address in the target
    #[arg(value_parser = parse)]
    gpa: u64,
    /// How many bytes; K, M and G are understood
    #[arg(value_parser = parse_size)]
    len: u64,
    /// Write the bytes themselves to standard output
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    #[command(flatten)]
    connect: Connect,
}

#[derive(Args)]
pub(crate) struct Write {
    /// First guest-physical address in the target
    #[arg(value_parser = parse)]
    gpa: u64,
    /// The bytes, as pairs of hexadecimal digits
    #[arg(value_name = "HEX", value_parser = parse_hex)]
    bytes: HexBytes,
    #[command(flatten)]
    connect: Connect,
}

/// Bytes that were read, as JSON.
#[derive(Serialize)]
struct Part {
    gpa: u64,
    hex: String,
}

/// What was written, as JSON.
#[derive(Serialize)]
struct Written {
    gpa: u64,
    bytes: usize,
}

impl Read {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        ensure!(self.len > 0, "nothing to read: LEN is 0");
        ensure!(
            self.gpa.checked_add(self.len - 1).is_some(),
            "LEN {:#x} bytes from GPA {:#x} on pass the end of the address space",
            self.len,
            self.gpa
        );
        let mut session = self.connect.accept()?;
        let mut dump = Hexdump::default();
        let mut buffer = vec![0; usize::try_from(self.len.min(CHUNK))?];
        let mut done = 0;
        while done < self.len {
            let part = usize::try_from((self.len - done).min(CHUNK))?;
            let part = buffer.get_mut(..part).context("the buffer is too small")?;
            let gpa = self.gpa + done;
            session.read_physical(gpa, part)?;
            if self.raw {
                output.raw(part)?;
            } else if output.is_json() {
                output.object(&Part { gpa, hex: hex(part) })?;
            } else {
                for line in dump.lines(gpa, part) {
                    output.line(line)?;
                }
            }
            done += part.len() as u64;
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Write {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let bytes = &self.bytes.0;
        self.connect.accept()?.write_physical(self.gpa, bytes)?;
        if output.is_json() {
            output.object(&Written { gpa: self.gpa, bytes: bytes.len() })?;
        } else {
            output.line(format!("wrote {} bytes at {:#x}", bytes.len(), self.gpa))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

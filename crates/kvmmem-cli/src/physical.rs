// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem read` and `kvmmem write`: a target's memory by copy, over KVMI or by a view.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem::paging::AddressSpace;
use kvmmem::view::Access;
use serde::Serialize;

use crate::failure::usage;
use crate::hexdump::Hexdump;
use crate::number::{Hex, HexBytes, hex, parse, parse_hex, parse_length};
use crate::output::Output;
use crate::source::Source;
use crate::translate::Depth;

/// Bytes that are read before they are printed.
const CHUNK: u64 = 64 * 1024;

#[derive(Args)]
#[command(after_help = SOURCE_HELP)]
pub(crate) struct Read {
    /// First guest-physical address in the target, or guest-virtual with --gva
    #[arg(value_parser = parse)]
    address: u64,
    /// How many bytes
    #[arg(value_parser = parse_length)]
    len: u64,
    /// Write the bytes themselves to standard output
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    /// ADDRESS is guest-virtual: it is looked up in the page tables of --cr3
    #[arg(long, requires = "cr3")]
    gva: bool,
    /// The vCPU's CR3, or the address of the outermost table
    #[arg(long, requires = "gva", value_parser = parse)]
    cr3: Option<u64>,
    /// How many levels of page tables the target uses
    #[arg(long, requires = "gva", value_enum, default_value_t = Depth::Four)]
    levels: Depth,
    #[command(flatten)]
    source: Source,
}

#[derive(Args)]
#[command(after_help = SOURCE_HELP)]
pub(crate) struct Write {
    /// First guest-physical address in the target
    #[arg(value_parser = parse)]
    gpa: u64,
    /// The bytes, as pairs of hexadecimal digits
    #[arg(value_name = "HEX", value_parser = parse_hex)]
    bytes: HexBytes,
    #[command(flatten)]
    source: Source,
}

const SOURCE_HELP: &str = "\
The memory comes by KVMI (--listen, KVMMEM_KVMI_PORT), or by a view where a target, a token, a device or a broker is given.";

/// Bytes that were read, as JSON.
#[derive(Serialize)]
struct Part {
    #[serde(flatten)]
    address: Address,
    hex: String,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Address {
    Gpa(Hex),
    Gva(Hex),
}

/// What was written, as JSON.
#[derive(Serialize)]
struct Written {
    gpa: Hex,
    bytes: usize,
}

impl Read {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        if self.address.checked_add(self.len - 1).is_none() {
            let kind = if self.gva { "GVA" } else { "GPA" };
            return Err(usage(format!(
                "{:#x} bytes from {kind} {:#x} on pass the end of the address space",
                self.len, self.address
            )));
        }
        let space = self.cr3.map(|cr3| AddressSpace { cr3, levels: self.levels.into() });
        let mut memory = self.source.memory(Access::ReadOnly, "read")?;
        let mut dump = Hexdump::default();
        let mut buffer = vec![0; usize::try_from(self.len.min(CHUNK))?];
        let mut done = 0;
        while done < self.len {
            let part = usize::try_from((self.len - done).min(CHUNK))?;
            let part = buffer.get_mut(..part).context("the buffer is too small")?;
            let at = self.address + done;
            let address = match &space {
                Some(space) => {
                    space.read(at, part, |gpa, buf| memory.read(gpa, buf))?;
                    Address::Gva(Hex(at))
                }
                None => {
                    memory.read(at, part)?;
                    Address::Gpa(Hex(at))
                }
            };
            if self.raw {
                output.raw(part)?;
            } else if output.is_json() {
                output.object(&Part { address, hex: hex(part) })?;
            } else {
                for line in dump.lines(at, part) {
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
        self.source.memory(Access::Granted, "write")?.write(self.gpa, bytes)?;
        if output.is_json() {
            output.object(&Written { gpa: Hex(self.gpa), bytes: bytes.len() })?;
        } else {
            output.line(format!("wrote {} bytes at {:#x}", bytes.len(), self.gpa))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

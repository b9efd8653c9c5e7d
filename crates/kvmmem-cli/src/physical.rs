// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem read` and `kvmmem write`: a target's memory by copy, over KVMI or by a view.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem::view::Access;
use serde::Serialize;

use crate::address_space::{LinuxSpace, Virtual};
use crate::failure::usage;
use crate::hexdump::Hexdump;
use crate::input::Input;
use crate::linux::RestartCheck;
use crate::number::{Address, Hex, HexBytes, count, hex, parse, parse_hex, parse_length};
use crate::output::Output;
use crate::page_tables::{Depth, Tables};
use crate::range::pages;
use crate::source::Source;

/// Bytes that are read before they are printed.
const CHUNK: u64 = 64 * 1024;

#[derive(Args)]
#[command(after_help = READ_HELP)]
pub(crate) struct Read {
    /// First guest-physical address in the target, or guest-virtual with --pid, --cr3 or --vcpu
    #[arg(value_parser = parse)]
    address: u64,
    /// How many bytes
    #[arg(value_parser = parse_length)]
    len: u64,
    /// Write the bytes themselves to standard output
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    /// ADDRESS is guest-virtual, as it is with --cr3 in any case
    #[arg(long, requires = "cr3")]
    gva: bool,
    /// How many levels of page tables the target uses [default: what the tables look like]
    #[arg(long, requires = "cr3", conflicts_with = "pid", value_enum)]
    levels: Option<Depth>,
    #[command(flatten)]
    space: Virtual,
    #[command(flatten)]
    input: Input,
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

const READ_HELP: &str = "\
With --pid, memory that the process may not access (PROT_NONE) is read as well. A page that is not in memory, because it was
never used, was swapped out or is still in its file, ends the read.

The memory comes by KVMI (--listen, KVMMEM_KVMI_PORT), or by a view where a target, a token, a device or a broker is given, or
from a dump file.

Exit codes:
  0  done
  1  failed, standard error says why
  2  the command line is wrong
  4  with --pid, --vcpu or --cr3 kernel: the guest was restarted while it was read";

const SOURCE_HELP: &str = "\
The memory comes by KVMI (--listen, KVMMEM_KVMI_PORT), or by a view where a target, a token, a device or a broker is given.";

/// Bytes that were read, as JSON.
#[derive(Serialize)]
struct Part {
    #[serde(flatten)]
    address: Address,
    hex: String,
}

/// What was written, as JSON.
#[derive(Serialize)]
struct WriteLine {
    gpa: Hex,
    bytes: usize,
}

impl Read {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let is_virtual = self.space.is_given();
        if self.address.checked_add(self.len - 1).is_none() {
            let kind = if is_virtual { "GVA" } else { "GPA" };
            return Err(usage(format!(
                "{:#x} bytes from {kind} {:#x} on pass the end of the address space",
                self.len, self.address
            )));
        }
        if let Some(linux) = self.space.linux()? {
            let opened = self.input.open("read", &[])?;
            return linux.with_kernel(&self.input, &opened, |kernel, _| {
                let space = LinuxSpace::new(kernel, &linux, &self.input)?;
                self.print(output, |at, buf| space.read(at, buf))
            });
        }
        if let Some(vcpu) = self.space.vcpu {
            let (opened, space) = self.input.open_at_vcpu("read", vcpu)?;
            let restart = RestartCheck::begin(&opened)?;
            let (memory, tables) = (opened.memory(), Tables::of_vcpu(space));
            let read = |gpa, buf: &mut [u8]| memory.read_at(gpa, buf);
            let result = self.print(output, |at, buf| tables.read(at, buf, read));
            return restart.settle(None, result);
        }
        // Where a guest-virtual address leads is not known yet.
        let wanted = if is_virtual { Vec::new() } else { vec![pages(self.address, self.len)] };
        let mut memory = self.input.memory("read", &wanted)?;
        let cr3 = self.space.cr3();
        let tables = cr3.map(|cr3| Tables::new(cr3, self.levels, &[self.address], &mut memory));
        self.print(output, |at, buf| match &tables {
            Some(tables) => tables.read(at, buf, |gpa, buf| memory.read(gpa, buf)),
            None => {
                let (count, error) = memory.read_prefix(at, buf);
                (count, error.map(Into::into))
            }
        })
    }

    /// Prints what `read` reads: it returns how many bytes could be read, and why there are not
    /// more.
    fn print(
        &self,
        output: &mut Output,
        mut read: impl FnMut(u64, &mut [u8]) -> (usize, Option<anyhow::Error>),
    ) -> Result<ExitCode> {
        let mut dump = Hexdump::default();
        let mut buffer = vec![0; usize::try_from(self.len.min(CHUNK))?];
        let mut done = 0;
        while done < self.len {
            let part = usize::try_from((self.len - done).min(CHUNK))?;
            let part = buffer.get_mut(..part).context("the buffer is too small")?;
            let at = self.address + done;
            let (count, error) = read(at, part);
            let part = part.get(..count).context("more was read than asked for")?;
            if part.is_empty() {
                // Nothing lies before the address that cannot be read.
            } else if self.raw {
                output.raw(part)?;
            } else if output.is_json() {
                output.object(&Part { address: self.space.address(at), hex: hex(part) })?;
            } else {
                for line in dump.lines(at, part) {
                    output.line(line)?;
                }
            }
            done += part.len() as u64;
            if let Some(error) = error {
                return Err(match done {
                    0 => error,
                    _ => error.context(format!(
                        "the read ended early, after {done:#x} of {:#x} bytes",
                        self.len
                    )),
                });
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Write {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let bytes = &self.bytes.0;
        let wanted = [pages(self.gpa, bytes.len() as u64)];
        self.source.memory(Access::Granted, "write", &wanted)?.write(self.gpa, bytes)?;
        if output.is_json() {
            output.object(&WriteLine { gpa: Hex(self.gpa), bytes: bytes.len() })?;
        } else {
            output.line(format!("wrote {} at {:#x}", count(bytes.len(), "byte"), self.gpa))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

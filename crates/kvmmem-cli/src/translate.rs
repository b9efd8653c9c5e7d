// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem translate`: where a target's virtual addresses lead.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use kvmmem::paging::{AddressSpace, Entry, Levels, Translation, Walk, WalkError};
use kvmmem::view::Access;
use serde::Serialize;

use crate::failure::escape;
use crate::number::{Hex, parse, size};
use crate::output::Output;
use crate::source::{MemoryError, Source};

/// Exit code where an address is not mapped.
const NOT_MAPPED: u8 = 3;

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// The vCPU's CR3, or the address of the outermost table
    #[arg(value_parser = parse)]
    cr3: u64,
    /// Guest-virtual addresses
    #[arg(value_name = "GVA", required = true, value_parser = parse)]
    gvas: Vec<u64>,
    /// How many levels of page tables the target uses
    #[arg(long, value_enum, default_value_t = Depth::Four)]
    levels: Depth,
    /// Print the entries of the page tables as well; JSON always has them
    #[arg(long, short)]
    verbose: bool,
    #[command(flatten)]
    source: Source,
}

const AFTER_HELP: &str = "\
What is printed: GVA, GPA, size of the page, and what the tables allow (r, w, x; user or kernel).
The memory comes by KVMI (--listen, KVMMEM_KVMI_PORT), or by a view where a target, a token, a device or a broker is given.

Exit codes:
  0  every address is mapped
  1  failed, standard error says why
  2  the command line is wrong
  3  an address is not mapped";

/// Levels of page tables, on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Depth {
    /// 48-bit addresses
    #[value(name = "4")]
    Four,
    /// 57-bit addresses, where CR4.LA57 is set
    #[value(name = "5")]
    Five,
}

impl From<Depth> for Levels {
    fn from(depth: Depth) -> Self {
        match depth {
            Depth::Four => Self::Four,
            Depth::Five => Self::Five,
        }
    }
}

/// An address, as JSON.
#[derive(Serialize)]
struct Translated {
    gva: Hex,
    #[serde(flatten)]
    page: Option<Page>,
    /// Why there is no page.
    error: Option<String>,
    entries: Vec<EntryInfo>,
}

#[derive(Serialize)]
struct Page {
    gpa: Hex,
    page_size: u64,
    writable: bool,
    user: bool,
    executable: bool,
}

#[derive(Serialize)]
struct EntryInfo {
    level: u8,
    gpa: Hex,
    value: Hex,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let space = AddressSpace { cr3: self.cr3, levels: self.levels.into() };
        let mut memory = self.source.memory(Access::ReadOnly, "translate")?;
        let mut all_mapped = true;
        for &gva in &self.gvas {
            let Walk { entries, end } = space.walk(gva, |gpa, buf| memory.read(gpa, buf));
            let end = match end {
                Ok(translation) => Ok(translation),
                Err(error @ (WalkError::Table { .. } | WalkError::Page { .. })) => return Err(error.into()),
                Err(error) => Err(explain(&error)),
            };
            all_mapped &= end.is_ok();
            if output.is_json() {
                output.object(&Translated::new(gva, &entries, end))?;
            } else {
                for line in text(gva, if self.verbose { &entries } else { &[] }, end) {
                    output.line(line)?;
                }
            }
        }
        Ok(if all_mapped { ExitCode::SUCCESS } else { ExitCode::from(NOT_MAPPED) })
    }
}

/// What a walk's end means, with the remedy where there is one.
fn explain(error: &WalkError<MemoryError>) -> String {
    let remedy = match error {
        WalkError::NotCanonical { gva, levels: Levels::Four } if Levels::Five.is_canonical(*gva) => {
            "; if the target uses five, give --levels 5"
        }
        _ => "",
    };
    format!("{error}{remedy}")
}

fn text(gva: u64, entries: &[Entry], end: Result<Translation, String>) -> Vec<String> {
    let mut lines: Vec<String> = entries.iter().map(|entry| format!("  {entry}")).collect();
    lines.push(match end {
        Ok(Translation { gpa, page_size, permissions }) => {
            let flag = |allowed, letter| if allowed { letter } else { '-' };
            let (w, x) = (flag(permissions.is_writable, 'w'), flag(permissions.is_executable, 'x'));
            let mode = if permissions.is_user { "user" } else { "kernel" };
            format!("{gva:#018x}  {gpa:#014x}  {}  r{w}{x}  {mode}", size(page_size))
        }
        Err(error) => format!("{gva:#018x}  {}", escape(&error)),
    });
    lines
}

impl Translated {
    fn new(gva: u64, entries: &[Entry], end: Result<Translation, String>) -> Self {
        let entry =
            |entry: &Entry| EntryInfo { level: entry.level, gpa: Hex(entry.gpa), value: Hex(entry.value) };
        let (page, error) = match end {
            Ok(Translation { gpa, page_size, permissions }) => {
                let (writable, user) = (permissions.is_writable, permissions.is_user);
                let executable = permissions.is_executable;
                (Some(Page { gpa: Hex(gpa), page_size, writable, user, executable }), None)
            }
            Err(error) => (None, Some(error)),
        };
        Self { gva: Hex(gva), page, error, entries: entries.iter().map(entry).collect() }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem translate`: where a target's virtual addresses lead.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem::paging::{Absent, Entry, Levels, Translation, Walk, WalkError};
use serde::Serialize;

use crate::address_space::{LinuxSpace, Root, Virtual, parse_root};
use crate::escape::escape;
use crate::failure::usage;
use crate::input::Input;
use crate::linux::RestartCheck;
use crate::memory::MemoryError;
use crate::number::{Hex, parse, size};
use crate::output::Output;
use crate::page_tables::{Depth, Tables};

/// Exit code where an address is not mapped.
const NOT_MAPPED: u8 = 3;

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// The vCPU's CR3, the address of the outermost table, or kernel: that of the Linux kernel
    /// that is found; with --pid, --cr3 or --vcpu not given, and the first GVA is in its place
    #[arg(value_name = "CR3", value_parser = parse_root)]
    first: Root,
    /// Guest-virtual addresses
    #[arg(value_name = "GVA", required_unless_present_any = ["pid", "cr3", "vcpu"], value_parser = parse)]
    gvas: Vec<u64>,
    /// How many levels of page tables the target uses [default: what the tables look like]
    #[arg(long, conflicts_with_all = ["pid", "vcpu"], value_enum)]
    levels: Option<Depth>,
    /// Print the entries of the page tables as well; JSON always has them
    #[arg(long, short)]
    verbose: bool,
    #[command(flatten)]
    space: Virtual,
    #[command(flatten)]
    input: Input,
}

const AFTER_HELP: &str = "\
Of an entry that is not present, the line says what it may mean to Linux or Windows where the page is in memory.
What is printed: GVA, GPA, size of the page, and what the tables allow (r, w, x; user or kernel).
The memory comes by KVMI (--listen, KVMMEM_KVMI_PORT), or by a view where a target, a token, a device or a broker is given, or
from a dump file.

Exit codes:
  0  every address is mapped
  1  failed, standard error says why
  2  the command line is wrong
  3  an address is not mapped, or its tables are not in memory; each address has its line
  4  with --pid, --vcpu or the kernel's tables: the guest was restarted while they were read";

/// An address, as JSON.
#[derive(Serialize)]
struct TranslationLine {
    gva: Hex,
    /// How many levels the tables were read with.
    levels: u8,
    #[serde(flatten)]
    page: Option<Page>,
    /// Why there is no page.
    error: Option<String>,
    /// What the entry that is not present may mean to the operating system.
    absent: Option<AbsentLine>,
    entries: Vec<EntryInfo>,
}

#[derive(Serialize)]
#[serde(tag = "meaning", rename_all = "snake_case")]
enum AbsentLine {
    ProtNone { gpa: Hex },
    Transition { gpa: Hex },
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
        let (space, gvas) = self.places()?;
        if let Some(linux) = space.linux()? {
            let opened = self.input.open("translate", &[])?;
            return linux.with_kernel(&self.input, &opened, |kernel, _| {
                let space = LinuxSpace::new(kernel, &linux, &self.input)?;
                let walk = |gva| space.space.walk(gva);
                let is_local = kvmmem_memory::MemoryError::is_local;
                self.print(output, &gvas, space.space.levels(), walk, is_local, |error| {
                    space.remedy(error)
                })
            });
        }
        if let Some(vcpu) = space.vcpu {
            let (opened, space) = self.input.open_at_vcpu("translate", vcpu)?;
            let restart = RestartCheck::begin(&opened)?;
            let (memory, tables) = (opened.memory(), Tables::of_vcpu(space));
            let walk = |gva| tables.space.walk(gva, |gpa, buf| memory.read_at(gpa, buf));
            let remedy = |error: &_| tables.remedy(error).to_owned();
            let is_local = kvmmem_memory::MemoryError::is_local;
            let result = self.print(output, &gvas, tables.space.levels, walk, is_local, remedy);
            return restart.settle(None, result);
        }
        let mut memory = self.input.memory("translate", &[])?;
        let cr3 = space.cr3().context("no CR3 is given")?;
        let tables = Tables::new(cr3, self.levels, &gvas, &mut memory);
        let walk = |gva| tables.space.walk(gva, |gpa, buf| memory.read(gpa, buf));
        let remedy = |error: &_| tables.remedy(error).to_owned();
        self.print(output, &gvas, tables.space.levels, walk, MemoryError::is_of_address, remedy)
    }

    /// Which tables, and the addresses.
    fn places(&self) -> Result<(Virtual, Vec<u64>)> {
        if !self.space.is_given() {
            return Ok((Virtual { cr3: Some(self.first), ..self.space }, self.gvas.clone()));
        }
        match self.first {
            Root::At(gva) => Ok((self.space, [&[gva], &self.gvas[..]].concat())),
            Root::Kernel => Err(usage(
                "\"kernel\" is not a guest-virtual address, and --pid, --cr3 or --vcpu says whose tables",
            )),
        }
    }

    fn print<E: std::error::Error + Send + Sync + 'static>(
        &self,
        output: &mut Output,
        gvas: &[u64],
        levels: Levels,
        mut walk: impl FnMut(u64) -> Walk<E>,
        is_local: impl Fn(&E) -> bool,
        remedy: impl Fn(&WalkError<E>) -> String,
    ) -> Result<ExitCode> {
        let levels = levels.count();
        let mut all_mapped = true;
        for &gva in gvas {
            let Walk { entries, end } = walk(gva);
            let end = match end {
                Ok(translation) => Ok(translation),
                // No address can be looked up.
                Err(WalkError::Table { level, ref source, .. })
                    if level == levels || !is_local(source) =>
                {
                    return end.map(|_| ExitCode::SUCCESS).map_err(Into::into);
                }
                Err(error) => Err(AbsentPage::new(gva, &error, &remedy(&error))),
            };
            all_mapped &= end.is_ok();
            if output.is_json() {
                output.object(&TranslationLine::new(gva, levels, &entries, end))?;
            } else {
                for line in text(gva, if self.verbose { &entries } else { &[] }, end) {
                    output.line(line)?;
                }
            }
        }
        Ok(if all_mapped { ExitCode::SUCCESS } else { ExitCode::from(NOT_MAPPED) })
    }
}

/// Why an address has no page.
struct AbsentPage {
    /// In words, with the remedy where there is one.
    text: String,
    absent: Option<Absent>,
}

impl AbsentPage {
    fn new<E: std::error::Error>(gva: u64, error: &WalkError<E>, remedy: &str) -> Self {
        let mut text = format!("{error}{remedy}");
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text += &format!(": {cause}");
            source = cause.source();
        }
        let absent = match error {
            WalkError::NotPresent { entry, .. } => entry.absent(gva),
            _ => None,
        };
        Self { text, absent }
    }
}

fn text(gva: u64, entries: &[Entry], end: Result<Translation, AbsentPage>) -> Vec<String> {
    let mut lines: Vec<String> = entries.iter().map(|entry| format!("  {entry}")).collect();
    lines.push(match end {
        Ok(Translation { gpa, page_size, permissions }) => {
            let flag = |allowed, letter| if allowed { letter } else { '-' };
            let (w, x) = (flag(permissions.is_writable, 'w'), flag(permissions.is_executable, 'x'));
            let mode = if permissions.is_user { "user" } else { "kernel" };
            format!("{gva:#018x}  {gpa:#014x}  {}  r{w}{x}  {mode}", size(page_size))
        }
        Err(AbsentPage { text, .. }) => format!("{gva:#018x}  {}", escape(&text)),
    });
    lines
}

impl TranslationLine {
    fn new(gva: u64, levels: u8, entries: &[Entry], end: Result<Translation, AbsentPage>) -> Self {
        let entry = |entry: &Entry| EntryInfo {
            level: entry.level,
            gpa: Hex(entry.gpa),
            value: Hex(entry.value),
        };
        let entries = entries.iter().map(entry).collect();
        let mut line =
            Self { gva: Hex(gva), levels, page: None, error: None, absent: None, entries };
        match end {
            Ok(Translation { gpa, page_size, permissions }) => {
                let (writable, user) = (permissions.is_writable, permissions.is_user);
                let executable = permissions.is_executable;
                line.page = Some(Page { gpa: Hex(gpa), page_size, writable, user, executable });
            }
            Err(AbsentPage { text, absent }) => {
                line.error = Some(text);
                line.absent = absent.and_then(AbsentLine::new);
            }
        }
        line
    }
}

impl AbsentLine {
    fn new(absent: Absent) -> Option<Self> {
        match absent {
            Absent::ProtNone { gpa } => Some(Self::ProtNone { gpa: Hex(gpa) }),
            Absent::Transition { gpa } => Some(Self::Transition { gpa: Hex(gpa) }),
            Absent::Unknown => None,
        }
    }
}

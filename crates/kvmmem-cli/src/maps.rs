// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem maps`: the memory mappings of processes of a Linux guest.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem_linux::Kernel;
use kvmmem_linux::KernelError::TooMuch;
use kvmmem_linux::maps::{Mapping, Maps, MemoryMap};
use kvmmem_linux::tasks::{Task, Tasks, Which};
use serde::Serialize;

use crate::escape::escape;
use crate::linux::{Damage, Guest, collect, process};
use crate::number::{Hex, integer};
use crate::output::Output;

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Processes [default: all]
    #[arg(value_name = "PID", value_parser = integer(0..=u32::MAX))]
    pids: Vec<u32>,
    #[command(flatten)]
    guest: Guest,
}

const AFTER_HELP: &str = "\
The columns are those of /proc/PID/maps: START-END, what is allowed (r, w, x; p private or s shared), OFFSET in the file, DEVICE
and INODE of the file, and its path or what the kernel calls the memory. Paths begin at the root of their mounts. A thread of
the kernel, and a process that has ended, has no mappings, as standard error says of one that is named. Where there are several processes, a line with its number and name comes
before the mappings of each. A ? in place of a path says that it could not be read (\"damaged\" in JSON).

Exit codes:
  0  done
  1  failed, standard error says why: there is no such process, or its mappings are damaged or changed while they were read
  2  the command line is wrong
  3  some of it could not be read, standard error says how much; the rest was printed
  4  the guest was restarted while it was read";

/// A mapping, as JSON.
#[derive(Serialize)]
struct MappingLine<'a> {
    pid: u32,
    start: Hex,
    end: Hex,
    permissions: String,
    offset: Hex,
    major: u32,
    minor: u32,
    inode: u64,
    /// `None` for memory without a file.
    path: Option<&'a str>,
    deleted: bool,
    /// The kernel's name for memory without a file.
    label: Option<&'a str>,
    /// Whether the process's mappings changed during every read.
    torn: bool,
    /// Whether the file or the name could not be read, or nothing but the addresses.
    damaged: bool,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let (found, damage) = self.guest.with_kernel("maps", |kernel| self.find(kernel))?;
        let is_torn = found.iter().any(|(_, map)| map.is_torn);
        for (task, map) in &found {
            if map.is_torn {
                tracing::warn!(
                    "the mappings of process {} changed whenever they were read: some may be missing; try again",
                    task.pid
                );
            }
            if map.mappings.is_empty() {
                let why = if task.is_kernel {
                    "a thread of the kernel"
                } else {
                    "a process that has ended"
                };
                tracing::warn!("{} is {why}: it has no mappings", task.pid);
            }
            if !output.is_json() && self.pids.len() != 1 {
                output.line(format!("{} {}", task.pid, escape(&task.comm)))?;
            }
            for mapping in &map.mappings {
                let line = MappingLine::new(task.pid, mapping, map.is_torn);
                if output.is_json() {
                    output.object(&line)?;
                } else {
                    output.line(text(mapping, &line))?;
                }
            }
        }
        let end = self.guest.end(damage)?;
        Ok(if is_torn { ExitCode::FAILURE } else { end })
    }

    fn find(&self, kernel: &Kernel<'_>) -> Result<(Vec<(Task, MemoryMap)>, Damage)> {
        let mut damage = Damage::default();
        let tasks = match &self.pids[..] {
            [] => {
                let tasks = collect(|| Tasks::new(kernel, Which::Processes))
                    .context("cannot list the processes")?;
                damage.missing(tasks.lost, "process", "processes");
                tasks.rows
            }
            pids => pids
                .iter()
                .map(|pid| process(kernel, *pid, &self.guest.arguments()))
                .collect::<Result<_>>()?,
        };
        let maps = Maps::new(kernel)?;
        let (mut found, mut cut) = (Vec::new(), 0);
        for task in tasks {
            match maps.of(&task) {
                // Of all processes, those without mappings are left out.
                Ok(map) if self.pids.is_empty() && map.mappings.is_empty() => {}
                Ok(map) => {
                    cut += usize::from(map.is_cut);
                    damage.marked(map.mappings.iter().map(|mapping| mapping.is_damaged));
                    found.push((task, map));
                }
                Err(error) if error.is_local() && self.pids.len() != 1 => cut += 1,
                Err(error) => {
                    let remedy = match error {
                        TooMuch { .. } if self.pids.len() != 1 => {
                            "; list single processes by their PID"
                        }
                        _ => "",
                    };
                    return Err(error).with_context(|| {
                        format!("cannot list the mappings of process {}{remedy}", task.pid)
                    });
                }
            }
        }
        damage.missing(cut, "process's list of mappings", "processes' lists of mappings");
        Ok((found, damage))
    }
}

/// A line of /proc/PID/maps.
fn text(mapping: &Mapping, line: &MappingLine<'_>) -> String {
    let Mapping { start, end, offset, .. } = mapping;
    let MappingLine { permissions, major, minor, inode, path, deleted, label, damaged, .. } = line;
    let place =
        format!("{start:08x}-{end:08x} {permissions} {offset:08x} {major:02x}:{minor:02x} {inode}");
    let deleted = if *deleted { " (deleted)" } else { "" };
    let line = format!(
        "{place:72} {}{deleted}",
        escape(path.or(*label).unwrap_or(if *damaged { "?" } else { "" }))
    );
    line.trim_end().to_owned()
}

impl<'a> MappingLine<'a> {
    fn new(pid: u32, mapping: &'a Mapping, torn: bool) -> Self {
        let file = mapping.file.as_ref();
        Self {
            pid,
            start: Hex(mapping.start),
            end: Hex(mapping.end),
            permissions: mapping.permissions(),
            offset: Hex(mapping.offset),
            major: file.map_or(0, |file| file.major),
            minor: file.map_or(0, |file| file.minor),
            inode: file.map_or(0, |file| file.inode),
            path: file.map(|file| file.path.text.as_str()),
            deleted: file.is_some_and(|file| file.path.is_deleted),
            label: mapping.label.as_deref(),
            torn,
            damaged: mapping.is_damaged,
        }
    }
}

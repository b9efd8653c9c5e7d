// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem files`: the files that processes of a Linux guest have open.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use kvmmem_linux::Kernel;
use kvmmem_linux::KernelError::TooMuch;
use kvmmem_linux::files::{Files, OpenFile};
use kvmmem_linux::tasks::{Task, Tasks, Which};
use serde::Serialize;

use crate::linux::{Damage, Guest, Listing, collect, no_process};
use crate::number::{Hex, integer};
use crate::output::Output;
use crate::table::{Table, mark, or_unknown};

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Of this process alone; may be repeated
    #[arg(long, value_name = "PID", value_parser = integer(0..=u32::MAX))]
    pid: Vec<u32>,
    #[command(flatten)]
    table: Table,
    #[command(flatten)]
    guest: Guest,
}

const AFTER_HELP: &str = "\
A path begins at the root of the mounts that its process has. What has no path is shown as /proc/PID/fd shows it: pipe:[N],
socket:[N], anon_inode:[NAME]. FLAGS are those of open(2), octal; POSITION is where the next read or write begins. A ! after a
descriptor says that the file changed whenever it was read; a ?, that some of it could not be read (\"damaged\" in JSON).

Exit codes:
  0  done
  1  failed, standard error says why: no kernel was found, or one without symbols or types, there is no such process, or its
     table of files is damaged
  2  the command line is wrong
  3  some of it could not be read, standard error says how much; the rest was printed
  4  the guest was restarted while it was read";

/// A file, as JSON.
#[derive(Serialize)]
struct FileLine<'a> {
    pid: u32,
    comm: &'a str,
    fd: u32,
    path: Option<&'a str>,
    deleted: bool,
    flags: Option<Hex>,
    position: Option<Hex>,
    /// Where its `struct file` is.
    file: Hex,
    torn: bool,
    damaged: bool,
}

/// Processes with their files.
type ProcessFiles = Vec<(Task, Vec<OpenFile>)>;

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let (found, damage) = self.guest.with_kernel("files", |kernel| self.find(kernel))?;
        let files =
            found.iter().flat_map(|(task, files)| files.iter().map(move |file| (task, file)));
        let header = ["PID", "NAME", "FD", "FLAGS", "POSITION", "PATH"];
        self.table.print(output, files, FileLine::new, header, row)?;
        self.guest.end(damage)
    }

    fn find(&self, kernel: &Kernel<'_>) -> Result<(ProcessFiles, Damage)> {
        let Listing { rows: mut tasks, lost } = collect(|| Tasks::new(kernel, Which::Processes))
            .context("cannot list the processes")?;
        for pid in &self.pid {
            let is_there = tasks.iter().any(|task| task.pid == *pid);
            ensure!(
                is_there || lost == 0,
                "process {pid} cannot be read, or there is none: {lost} cannot"
            );
            ensure!(is_there, no_process(kernel, *pid, &self.guest.arguments()));
        }
        let mut damage = Damage::default();
        if self.pid.is_empty() {
            damage.missing(lost, "process", "processes");
        }
        tasks.retain(|task| self.pid.is_empty() || self.pid.contains(&task.pid));
        let files = Files::new(kernel)?;
        let (mut found, mut cut) = (ProcessFiles::new(), 0);
        for task in tasks {
            match collect(|| Ok(std::iter::once(files.of(&task)))) {
                Ok(open) => {
                    let open: Vec<_> = open.rows;
                    cut += open.iter().filter(|open| open.is_cut).count();
                    let open: Vec<_> = open.into_iter().flat_map(|open| open.files).collect();
                    damage.marked(open.iter().map(|file| file.is_damaged));
                    found.push((task, open));
                }
                Err(error) if error.is_local() && self.pid.len() != 1 => cut += 1,
                Err(error) => {
                    let remedy = match error {
                        TooMuch { .. } if self.pid.len() != 1 => {
                            "; list single processes with --pid"
                        }
                        _ => "",
                    };
                    return Err(error).with_context(|| {
                        format!("cannot list the files of process {}{remedy}", task.pid)
                    });
                }
            }
        }
        damage.missing(cut, "process's table of files", "processes' tables of files");
        Ok((found, damage))
    }
}

fn row((task, file): (&Task, &OpenFile)) -> [String; 6] {
    [
        task.pid.to_string(),
        task.comm.clone(),
        format!("{}{}", file.fd, mark(file.is_torn, file.is_damaged)),
        or_unknown(file.flags.map(|flags| format!("{flags:o}"))),
        or_unknown(file.position),
        or_unknown(known(&file.path.text)) + if file.path.is_deleted { " (deleted)" } else { "" },
    ]
}

/// A text that could be read.
fn known(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

impl<'a> FileLine<'a> {
    fn new((task, file): (&'a Task, &'a OpenFile)) -> Self {
        Self {
            pid: task.pid,
            comm: &task.comm,
            fd: file.fd,
            path: known(&file.path.text),
            deleted: file.path.is_deleted,
            flags: file.flags.map(|flags| Hex(flags.into())),
            position: file.position.map(Hex),
            file: Hex(file.gva),
            torn: file.is_torn,
            damaged: file.is_damaged,
        }
    }
}

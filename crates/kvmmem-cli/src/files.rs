// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem files`: the files that processes of a Linux guest have open.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use kvmmem_linux::files::{Files, OpenFile};
use kvmmem_linux::tasks::{Task, Tasks, Which};
use kvmmem_linux::{Kernel, KernelError};
use serde::Serialize;

use crate::linux::{Guest, collect};
use crate::number::Hex;
use crate::output::Output;
use crate::table::Table;

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Of this process alone; may be repeated
    #[arg(long, value_name = "PID")]
    pid: Vec<u32>,
    #[command(flatten)]
    table: Table,
    #[command(flatten)]
    guest: Guest,
}

const AFTER_HELP: &str = "\
A path begins at the root of the mounts that its process has. What has no path is shown as /proc/PID/fd shows it: pipe:[N],
socket:[N], anon_inode:[NAME]. FLAGS are those of open(2), octal; POSITION is where the next read or write begins. A ! after a descriptor says that the
file changed whenever it was read.

Exit codes:
  0  done
  1  failed, standard error says why: no kernel was found, or one without symbols or types, there is no such process, or its
     files are damaged
  2  the command line is wrong
  4  the guest was restarted while it was read";

/// A file, as JSON.
#[derive(Serialize)]
struct FileLine<'a> {
    pid: u32,
    comm: &'a str,
    fd: u32,
    path: &'a str,
    deleted: bool,
    flags: Hex,
    position: Hex,
    /// Where its `struct file` is.
    file: Hex,
    torn: bool,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let found = self.guest.with_kernel("files", |kernel| self.find(kernel))?;
        let files = found.iter().flat_map(|(task, files)| files.iter().map(move |file| (task, file)));
        let header = ["PID", "NAME", "FD", "FLAGS", "POSITION", "PATH"];
        self.table.print(output, files, FileLine::new, header, row)?;
        Ok(ExitCode::SUCCESS)
    }

    fn find(&self, kernel: &Kernel<'_>) -> Result<Vec<(Task, Vec<OpenFile>)>> {
        let mut tasks =
            collect(|| Tasks::new(kernel, Which::Processes)).context("cannot list the processes")?;
        for pid in &self.pid {
            ensure!(tasks.iter().any(|task| task.pid == *pid), "the guest has no process {pid}");
        }
        tasks.retain(|task| self.pid.is_empty() || self.pid.contains(&task.pid));
        let files = Files::new(kernel)?;
        let of = |task: Task| {
            let open = collect(|| Ok::<_, KernelError>(files.of(&task)?.into_iter().map(Ok)));
            let open = open.with_context(|| format!("cannot list the files of process {}", task.pid))?;
            Ok((task, open))
        };
        tasks.into_iter().map(of).collect()
    }
}

fn row((task, file): (&Task, &OpenFile)) -> [String; 6] {
    [
        task.pid.to_string(),
        task.comm.clone(),
        format!("{}{}", file.fd, if file.is_torn { "!" } else { "" }),
        format!("{:o}", file.flags),
        file.position.to_string(),
        file.path.text.clone() + if file.path.is_deleted { " (deleted)" } else { "" },
    ]
}

impl<'a> FileLine<'a> {
    fn new((task, file): (&'a Task, &'a OpenFile)) -> Self {
        Self {
            pid: task.pid,
            comm: &task.comm,
            fd: file.fd,
            path: &file.path.text,
            deleted: file.path.is_deleted,
            flags: Hex(file.flags.into()),
            position: Hex(file.position),
            file: Hex(file.gva),
            torn: file.is_torn,
        }
    }
}

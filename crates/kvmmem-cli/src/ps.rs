// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem ps`: the processes of a Linux guest.

mod changes;
mod live;
mod tree;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem_linux::tasks::{Task, Tasks, Which};
use serde::Serialize;

use crate::failure::escape;
use crate::linux::{Guest, collect};
use crate::number::{Hex, parse_duration};
use crate::output::{Output, columns};

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Print each process below the one that it belongs to
    #[arg(long)]
    tree: bool,
    /// Print the threads of each process as well
    #[arg(long, conflicts_with = "tree")]
    threads: bool,
    /// Show what starts and ends, until interrupted: on a terminal a table that stays in place, else a line for each
    #[arg(long, conflicts_with_all = ["tree", "file"])]
    watch: bool,
    /// With --watch: how long to wait between two looks, for example 200ms or 1s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration, requires = "watch", conflicts_with = "file")]
    interval: Duration,
    /// With --watch: look this many times, then end [default: until interrupted]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..), requires = "watch", conflicts_with = "file")]
    count: Option<u64>,
    #[command(flatten)]
    guest: Guest,
}

/// The deepest process that `--tree` indents: the guest may nest any number.
const MAX_DEPTH: usize = 32;

const AFTER_HELP: &str = "\
Nothing is installed in the guest, and no symbol file is needed. Users are numbers, those of the first user namespace; START
is in seconds since boot, as dmesg has it; the states are those of ps(1). Names in brackets are the kernel's own threads.
A ! after a state says that the process changed whenever it was read, so that its values may not belong together.

With --watch, what starts and ends between two looks is not seen. Each line has the seconds since the first look; with --json the
event is \"started\" or \"ended\", with the milliseconds and the values of the process.

Exit codes:
  0  done
  1  failed, standard error says why: no kernel was found, or one without symbols or types, or its lists are damaged
  2  the command line is wrong";

/// A task, as JSON.
#[derive(Serialize)]
struct TaskLine<'a> {
    pid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    tid: Option<u32>,
    ppid: u32,
    uid: u32,
    euid: u32,
    gid: u32,
    state: char,
    start_ms: u64,
    comm: &'a str,
    args: &'a [String],
    /// Whether the command line is longer than what could be read.
    args_cut: bool,
    kernel: bool,
    /// Where its `struct task_struct` is.
    task: Hex,
    torn: bool,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let which = if self.threads { Which::Threads } else { Which::Processes };
        if self.watch {
            self.guest.with_kernel("ps", |kernel| {
                let list = || collect(|| Tasks::new(kernel, which));
                live::watch(kernel, self.threads, (self.interval, self.count), list, output)
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        let tasks = self.guest.with_kernel("ps", |kernel| {
            collect(|| Tasks::new(kernel, which)).context("cannot list the processes")
        })?;
        let order =
            if self.tree { tree::order(&tasks) } else { (0..tasks.len()).map(|index| (index, 0)).collect() };
        let tasks: Vec<_> =
            order.iter().filter_map(|(index, depth)| Some((tasks.get(*index)?, *depth))).collect();
        if output.is_json() {
            for (task, _) in tasks {
                output.object(&TaskLine::new(task, self.threads))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        let header = ["PID", "TID", "PPID", "UID", "STATE", "START", "COMMAND"].map(str::to_owned);
        let rows: Vec<_> =
            std::iter::once(header).chain(tasks.iter().map(|(task, depth)| row(task, *depth))).collect();
        let lines = if self.threads {
            columns(&rows)
        } else {
            columns(&rows.into_iter().map(without_thread).collect::<Vec<_>>())
        };
        for line in lines {
            output.line(line)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn row(task: &Task, depth: usize) -> [String; 7] {
    [
        task.pid.to_string(),
        task.tid.to_string(),
        task.ppid.to_string(),
        task.euid.to_string(),
        format!("{}{}", task.state, if task.is_torn { "!" } else { "" }),
        format!("{}.{:02}", task.start.as_secs(), task.start.subsec_millis() / 10),
        "  ".repeat(depth.min(MAX_DEPTH)) + &command(task),
    ]
}

fn without_thread([pid, _, ppid, uid, state, start, command]: [String; 7]) -> [String; 6] {
    [pid, ppid, uid, state, start, command]
}

/// The command line, or the name of a process without one.
fn command(task: &Task) -> String {
    if task.is_kernel {
        return format!("[{}]", escape(&task.comm));
    }
    if task.args.words.is_empty() || task.tid != task.pid {
        return escape(&task.comm);
    }
    escape(&task.args.words.join(" ")) + if task.args.is_cut { " ..." } else { "" }
}

impl<'a> TaskLine<'a> {
    fn new(task: &'a Task, has_thread: bool) -> Self {
        Self {
            pid: task.pid,
            tid: has_thread.then_some(task.tid),
            ppid: task.ppid,
            uid: task.uid,
            euid: task.euid,
            gid: task.gid,
            state: task.state,
            start_ms: u64::try_from(task.start.as_millis()).unwrap_or(u64::MAX),
            comm: &task.comm,
            args: &task.args.words,
            args_cut: task.args.is_cut,
            kernel: task.is_kernel,
            task: Hex(task.gva),
            torn: task.is_torn,
        }
    }
}

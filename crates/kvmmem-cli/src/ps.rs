// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem ps`: the processes of a Linux guest.

mod changes;
mod live;
mod screen;
mod task_line;
mod tree;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use kvmmem_linux::process::{Details, Namespaces};
use kvmmem_linux::tasks::{Task, Tasks, Which};
use kvmmem_linux::{FilePath, KernelError};

use crate::linux::{Damage, Guest, Listing, collect};
use crate::number::integer;
use crate::output::Output;
use crate::table::{Table, mark, or_unknown};
use crate::time::parse_duration;
use task_line::{More, MoreLine, TaskLine, command};

#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Print each process below the one that it belongs to
    #[arg(long)]
    tree: bool,
    /// Print the threads of each process as well; with --tree below their process, before its
    /// children
    #[arg(long)]
    threads: bool,
    /// Show what starts and ends, until interrupted: on a terminal a table of all processes, else
    /// a line for each change
    #[arg(long, conflicts_with_all = ["tree", "file"])]
    watch: bool,
    /// With --watch: how long to wait between two looks, for example 200ms or 1s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration, requires = "watch", conflicts_with = "file")]
    interval: Duration,
    /// With --watch: look this many times, then end [default: until interrupted]
    #[arg(long, value_name = "COUNT", value_parser = integer(1..=u64::MAX), requires = "watch", conflicts_with = "file")]
    count: Option<u64>,
    /// Print the program that each process runs; JSON has it in any case
    #[arg(long, conflicts_with = "watch")]
    exe: bool,
    /// Print the environment of each process after its command line; in JSON as well
    #[arg(long, conflicts_with = "watch")]
    env: bool,
    /// Print the namespaces of each process; JSON has them in any case
    #[arg(long, conflicts_with = "watch")]
    namespaces: bool,
    #[command(flatten)]
    table: Table,
    #[command(flatten)]
    guest: Guest,
}

/// The deepest process that `--tree` indents: the guest may nest any number.
const MAX_DEPTH: usize = 32;

const AFTER_HELP: &str = "\
Nothing is installed in the guest, and no symbol file is needed. Users are numbers, those of the first user namespace; START
is in seconds since boot, as dmesg has it; the states are those of ps(1). Names in brackets are the kernel's own threads.
A ! after a state says that the process changed whenever it was read, so that its values may not belong together; a ?, that some
of them could not be read (\"damaged\" in JSON): these are ? or, in JSON, null.
Namespaces are the inode numbers that /proc/PID/ns shows. The environment is that which the process was started with, as far as it
is in memory and was not written over.

With --watch, what starts and ends between two looks is not seen; the exit code is that of the last look. On a terminal what has started in the last 10 s is green and what
has ended red, above the others; the arrows scroll, q ends. Elsewhere each line has the seconds since the first look; with --json the
event is \"started\" or \"ended\", with the milliseconds and the values of the process.

Exit codes:
  0  done
  1  failed, standard error says why: no kernel was found, or one without symbols or types, or its lists are damaged
  2  the command line is wrong
  3  some of it could not be read, standard error says how much; the rest was printed
  4  the guest was restarted while it was read";

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let which = if self.threads { Which::Threads } else { Which::Processes };
        if self.watch {
            let damage = self.guest.with_kernel("ps", |kernel| {
                let look = || {
                    let tasks = collect(|| Tasks::new(kernel, which))?;
                    let damage = self.damage(&tasks);
                    Ok((tasks, damage))
                };
                live::watch(kernel, self.threads, (self.interval, self.count), look, output)
            })?;
            return self.guest.end(damage);
        }
        let wants_more = output.is_json() || self.exe || self.namespaces || self.env;
        let (tasks, more) = self.guest.with_kernel("ps", |kernel| {
            let mut tasks =
                collect(|| Tasks::new(kernel, which)).context("cannot list the processes")?;
            if !wants_more {
                return Ok((tasks, Vec::new()));
            }
            let details = Details::new(kernel)?;
            let more = tasks
                .rows
                .iter_mut()
                .map(|task| self.more(task, &details))
                .collect::<Result<Vec<_>, _>>()?;
            Ok((tasks, more))
        })?;
        let damage = self.damage(&tasks);
        let tasks = tasks.rows;
        let order = if self.tree {
            tree::order(&tasks)
        } else {
            (0..tasks.len()).map(|index| (index, 0)).collect()
        };
        let tasks = order
            .iter()
            .filter_map(|(index, depth)| Some((tasks.get(*index)?, more.get(*index), *depth)));
        let nothing = More::default();
        self.table.print(
            output,
            tasks,
            |(task, more, _)| TaskLine::new(task, self.threads).with(more.map(MoreLine::new)),
            self.header(),
            |(task, more, depth)| self.row(task, more.unwrap_or(&nothing), depth),
        )?;
        self.guest.end(damage)
    }

    /// What of the tasks could not be read.
    fn damage(&self, tasks: &Listing<Task>) -> Damage {
        let mut damage = Damage::default();
        let names = if self.threads { ("thread", "threads") } else { ("process", "processes") };
        damage.missing(tasks.lost, names.0, names.1);
        damage.marked(tasks.rows.iter().map(|task| task.is_damaged));
        damage
    }

    /// Looks up what the options of `ps` add to a row. Where some of that cannot be read, the
    /// process is marked as damaged.
    fn more(&self, task: &mut Task, details: &Details<'_>) -> Result<More, KernelError> {
        let env = if self.env { Some(details.environment(task)) } else { None };
        let (exe, namespaces) = (details.executable(task), details.namespaces(task));
        Ok(More {
            exe: or_damaged(task, exe)?,
            env: env.map(|env| or_damaged(task, env)).transpose()?,
            namespaces: or_damaged(task, namespaces)?,
        })
    }

    fn header(&self) -> Vec<String> {
        let of = |is_wanted: bool, name| is_wanted.then_some(name);
        let fixed = ["PID", "TID", "PPID", "UID", "STATE", "START"];
        let fixed = fixed.into_iter().filter(|name| self.threads || *name != "TID");
        let namespaces = NAMESPACES.into_iter().filter(|_| self.namespaces);
        let last = of(self.exe, "EXE").into_iter().chain(["COMMAND"]);
        fixed.chain(namespaces).chain(last).map(str::to_owned).collect()
    }

    fn row(&self, task: &Task, more: &More, depth: usize) -> Vec<String> {
        let More { exe, env, namespaces } = more;
        let mut row = vec![task.pid.to_string()];
        row.extend(self.threads.then(|| task.tid.to_string()));
        row.extend([
            or_unknown(task.ppid),
            or_unknown(task.euid),
            format!("{}{}", task.state, mark(task.is_torn, task.is_damaged)),
            or_unknown(
                task.start
                    .map(|start| format!("{}.{:02}", start.as_secs(), start.subsec_millis() / 10)),
            ),
        ]);
        if self.namespaces {
            let Namespaces { cgroup, ipc, mnt, net, pid, time, user, uts } = *namespaces;
            let number = |number: Option<u32>| {
                number.map_or_else(|| "-".to_owned(), |number| number.to_string())
            };
            row.extend([cgroup, ipc, mnt, net, pid, time, user, uts].map(number));
        }
        if self.exe {
            let path =
                |exe: &FilePath| exe.text.clone() + if exe.is_deleted { " (deleted)" } else { "" };
            row.push(exe.as_ref().map_or_else(|| "-".to_owned(), path));
        }
        let words = env.iter().flat_map(|env| &env.words);
        let env: String = words.map(|word| format!(" {word}")).collect();
        row.push("  ".repeat(depth.min(MAX_DEPTH)) + &command(task) + &env);
        row
    }
}

/// Headings of namespaces.
const NAMESPACES: [&str; 8] = ["CGROUP", "IPC", "MNT", "NET", "PIDNS", "TIME", "USER", "UTS"];

/// The value, or nothing where it cannot be read.
fn or_damaged<T: Default>(
    task: &mut Task,
    value: Result<T, KernelError>,
) -> Result<T, KernelError> {
    value.or_else(|error| {
        task.is_damaged = true;
        if error.is_final() { Err(error) } else { Ok(T::default()) }
    })
}

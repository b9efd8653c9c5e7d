// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A process or thread as `ps` prints it.

use kvmmem_linux::FilePath;
use kvmmem_linux::process::Namespaces;
use kvmmem_linux::tasks::{Args, Task};
use serde::Serialize;

use crate::number::Hex;

/// A task, as JSON.
#[derive(Serialize)]
pub(super) struct TaskLine<'a> {
    pid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    tid: Option<u32>,
    ppid: Option<u32>,
    uid: Option<u32>,
    euid: Option<u32>,
    gid: Option<u32>,
    state: char,
    start_ms: Option<u64>,
    comm: Option<&'a str>,
    args: &'a [String],
    /// Whether the command line is longer than what could be read.
    args_cut: bool,
    kernel: bool,
    /// Where its `struct task_struct` is.
    task: Hex,
    torn: bool,
    damaged: bool,
    #[serde(flatten)]
    more: Option<MoreLine<'a>>,
}

/// Details that `ps` looks up, as JSON.
#[derive(Serialize)]
pub(super) struct MoreLine<'a> {
    /// The program; `None` for the kernel's threads, and for processes that have ended.
    exe: Option<&'a str>,
    exe_deleted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    env: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    env_cut: Option<bool>,
    namespaces: NamespaceNumbers,
}

/// Inode numbers of namespaces, as JSON; `None` for one that a process has left.
#[derive(Serialize)]
struct NamespaceNumbers {
    cgroup: Option<u32>,
    ipc: Option<u32>,
    mnt: Option<u32>,
    net: Option<u32>,
    pid: Option<u32>,
    time: Option<u32>,
    user: Option<u32>,
    uts: Option<u32>,
}

/// Details of a process.
#[derive(Default)]
pub(super) struct More {
    pub(super) exe: Option<FilePath>,
    pub(super) env: Option<Args>,
    pub(super) namespaces: Namespaces,
}

/// The command line, or the name of a process without one.
pub(super) fn command(task: &Task) -> String {
    let name = if task.comm.is_empty() { "?" } else { &task.comm };
    if task.is_kernel {
        return format!("[{name}]");
    }
    if task.tid != task.pid {
        return name.to_owned();
    }
    let words = task.args.words.join(" ");
    let command = if words.is_empty() { name } else { &words };
    command.to_owned() + if task.args.is_cut { " ..." } else { "" }
}

impl<'a> TaskLine<'a> {
    pub(super) fn new(task: &'a Task, has_thread: bool) -> Self {
        Self {
            pid: task.pid,
            tid: has_thread.then_some(task.tid),
            ppid: task.ppid,
            uid: task.uid,
            euid: task.euid,
            gid: task.gid,
            state: task.state,
            start_ms: task.start.map(|start| u64::try_from(start.as_millis()).unwrap_or(u64::MAX)),
            comm: Some(task.comm.as_str()).filter(|name| !name.is_empty()),
            args: &task.args.words,
            args_cut: task.args.is_cut,
            kernel: task.is_kernel,
            task: Hex(task.gva),
            torn: task.is_torn,
            damaged: task.is_damaged,
            more: None,
        }
    }

    /// The line with more details.
    pub(super) fn with(self, more: Option<MoreLine<'a>>) -> Self {
        Self { more, ..self }
    }
}

impl<'a> MoreLine<'a> {
    pub(super) fn new(more: &'a More) -> Self {
        let More { exe, env, namespaces } = more;
        let Namespaces { cgroup, ipc, mnt, net, pid, time, user, uts } = *namespaces;
        Self {
            exe: exe.as_ref().map(|exe| exe.text.as_str()),
            exe_deleted: exe.as_ref().is_some_and(|exe| exe.is_deleted),
            env: env.as_ref().map(|env| env.words.as_slice()),
            env_cut: env.as_ref().map(|env| env.is_cut),
            namespaces: NamespaceNumbers { cgroup, ipc, mnt, net, pid, time, user, uts },
        }
    }
}

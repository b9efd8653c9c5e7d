// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where the members of `struct task_struct`, and of the structures that it leads to, are.

use crate::kernel::{Kernel, KernelError};

/// The most bytes of a task that are read.
const MAX_LEN: u64 = 64 << 10;

/// Where everything is.
#[derive(Debug)]
pub(super) struct Layout {
    /// Bytes of a task that are read.
    pub(super) len: u64,
    pub(super) tasks: u64,
    pub(super) signal: u64,
    pub(super) thread_head: u64,
    pub(super) pid: u64,
    pub(super) tgid: u64,
    pub(super) real_parent: u64,
    pub(super) comm: u64,
    pub(super) flags: u64,
    pub(super) state: u64,
    /// References to the task, which has one as long as it is listed.
    pub(super) usage: Option<u64>,
    pub(super) exit_state: u64,
    pub(super) cred: u64,
    pub(super) uid: u64,
    pub(super) euid: u64,
    pub(super) gid: u64,
    /// The `struct user_struct` of the real user, and the user's id there.
    pub(super) user: Option<(u64, u64)>,
    pub(super) start: u64,
    pub(super) mm: u64,
    pub(super) pgd: u64,
    pub(super) arg_start: u64,
    pub(super) arg_end: u64,
    pub(super) env_end: u64,
    pub(super) kthread: Option<Kthread>,
}

/// Names of kernel threads that are longer than a task's.
#[derive(Debug)]
pub(super) struct Kthread {
    /// In the task: its `struct kthread`.
    pub(super) worker_private: u64,
    pub(super) full_name: u64,
    pub(super) data: u64,
    /// A pointer that each has.
    pub(super) parked: Option<u64>,
    /// In the worker of a work queue.
    pub(super) task: Option<u64>,
    pub(super) desc: u64,
    pub(super) pool: u64,
    pub(super) current_work: u64,
}

impl Layout {
    pub(super) fn new(kernel: &Kernel<'_>) -> Result<Self, KernelError> {
        let task = |member| kernel.offset("task_struct", member);
        let cred = |member| kernel.offset("cred", member);
        let mm = |member| kernel.offset("mm_struct", member);
        let mut layout = Self {
            len: 0,
            tasks: task("tasks")?,
            signal: task("signal")?,
            thread_head: kernel.offset("signal_struct", "thread_head")?,
            pid: task("pid")?,
            tgid: task("tgid")?,
            real_parent: task("real_parent")?,
            comm: task("comm")?,
            flags: task("flags")?,
            // Its type changed with its name, in 5.14.
            state: task("__state").or_else(|_| task("state"))?,
            usage: task("usage").ok(),
            exit_state: task("exit_state")?,
            cred: task("cred")?,
            uid: cred("uid")?,
            euid: cred("euid")?,
            gid: cred("gid")?,
            user: cred("user").ok().zip(kernel.offset("user_struct", "uid").ok()),
            start: task("start_boottime")?,
            mm: task("mm")?,
            pgd: mm("pgd")?,
            arg_start: mm("arg_start")?,
            arg_end: mm("arg_end")?,
            env_end: mm("env_end")?,
            kthread: Kthread::new(kernel).ok(),
        };
        let ends = [
            layout.pid,
            layout.tgid,
            layout.real_parent,
            layout.comm + 8,
            layout.flags,
            layout.state,
            layout.exit_state,
            layout.usage.unwrap_or(0),
            layout.cred,
            layout.start,
            layout.mm,
            layout.kthread.as_ref().map_or(0, |kthread| kthread.worker_private),
        ];
        layout.len = (ends.into_iter().max().unwrap_or(0) + 8).min(MAX_LEN);
        Ok(layout)
    }
}

impl Kthread {
    pub(super) fn new(kernel: &Kernel<'_>) -> Result<Self, KernelError> {
        let task = |member| kernel.offset("task_struct", member);
        let kthread = |member| kernel.offset("kthread", member);
        let worker = |member| kernel.offset("worker", member);
        Ok(Self {
            // Kernel threads of before 5.17 keep it where processes keep something else.
            worker_private: task("worker_private").or_else(|_| task("set_child_tid"))?,
            full_name: kthread("full_name").unwrap_or(0),
            data: kthread("data")?,
            parked: kthread("parked.wait.task_list.next").ok(),
            task: worker("task").ok(),
            desc: worker("desc")?,
            pool: worker("pool")?,
            current_work: worker("current_work")?,
        })
    }
}

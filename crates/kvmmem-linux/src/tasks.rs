// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Processes and threads, as /proc shows them.
//!
//! `init_task.tasks` lists the leaders of processes; the threads of one are in its
//! `signal->thread_head`. A task that changes while it is read is read again, then marked as torn;
//! one that ends meanwhile is left out. A task whose memory is damaged in part is listed without
//! the values that cannot be read, and marked as damaged.

mod layout;
mod reader;
mod task;

use crate::kernel::{Kernel, KernelError, List, Step, Walk};
use layout::Layout;
use reader::Reader;
pub use task::{Args, Task};

/// Which tasks are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// One a process: its leader.
    Processes,
    /// All threads, each after its leader.
    Threads,
}

/// The tasks; an error stands for tasks that cannot be read.
pub type Tasks<'a> = Walk<TaskSteps<'a>>;

/// The steps of [`Tasks`].
#[derive(Debug)]
pub struct TaskSteps<'a> {
    which: Which,
    leaders: List<'a>,
    /// Those of the last leader that are left.
    threads: Option<List<'a>>,
    /// Why those of the last leader cannot be read.
    error: Option<KernelError>,
    reader: Reader<'a>,
}

impl<'a> Tasks<'a> {
    /// The tasks of a kernel.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(kernel: &'a Kernel<'a>, which: Which) -> Result<Self, KernelError> {
        let layout = Layout::new(kernel)?;
        let head = kernel.symbol("init_task")?.wrapping_add(layout.tasks);
        let leaders = kernel.list_of(head, "task_struct", "tasks")?;
        let reader = Reader::new(kernel, layout);
        Ok(Self::of(TaskSteps { which, leaders, threads: None, error: None, reader }))
    }
}

impl Step for TaskSteps<'_> {
    type Item = Task;

    fn step(&mut self) -> Result<Option<Task>, KernelError> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let torn =
            |(task, is_torn): (Task, bool)| Task { is_torn: task.is_torn || is_torn, ..task };
        while let Some(threads) = &mut self.threads {
            let Some(found) = threads.next_with(|gva| self.reader.task(gva))? else {
                self.threads = None;
                break;
            };
            let task = torn(found);
            // The leader came first.
            if task.tid != task.pid {
                return Ok(Some(task));
            }
        }
        let Some(found) = self.leaders.next_with(|gva| self.reader.task(gva))? else {
            return Ok(None);
        };
        let task = torn(found);
        if self.which == Which::Threads {
            match self.reader.threads(task.gva) {
                Ok(threads) => self.threads = Some(threads),
                Err(error) => self.error = Some(error),
            }
        }
        Ok(Some(task))
    }
}

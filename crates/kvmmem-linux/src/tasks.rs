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

use crate::kernel::{Kernel, KernelError, List, MAX_NODES, Step, Walk};
use layout::Layout;
use reader::Reader;
pub use task::{Args, Task};

/// The most nodes of all lists together: Linux has at most 4 million tasks (PID_MAX_LIMIT), and a
/// leader is in two lists. Leaders may share a list of threads, each as long as a list can be.
const MAX_TASKS: usize = 2 * MAX_NODES;

/// The most bytes that all command lines together take; those after that are cut.
const MAX_ARGS: u64 = 256 << 20;

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
    /// Nodes that may follow.
    left: usize,
    reader: Reader<'a>,
}

impl<'a> Tasks<'a> {
    /// The tasks of a kernel. [`KernelError::TooMuch`] ends them where their lists have more nodes
    /// than twice as many tasks as Linux can have.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(kernel: &'a Kernel<'a>, which: Which) -> Result<Self, KernelError> {
        Self::with_limits(kernel, which, MAX_TASKS, MAX_ARGS)
    }

    /// The same with other limits: of nodes, of which a process has one, and with
    /// [`Which::Threads`] one more for each of its threads, its leader among them; and of the bytes
    /// that all command lines take.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn with_limits(
        kernel: &'a Kernel<'a>,
        which: Which,
        nodes: usize,
        args: u64,
    ) -> Result<Self, KernelError> {
        let layout = Layout::new(kernel)?;
        let head = kernel.symbol("init_task")?.wrapping_add(layout.tasks);
        let leaders = kernel.list_of(head, "task_struct", "tasks")?;
        let reader = Reader::new(kernel, layout, args);
        let (threads, error) = (None, None);
        Ok(Self::of(TaskSteps { which, leaders, threads, error, left: nodes, reader }))
    }
}

impl Step for TaskSteps<'_> {
    type Item = Task;

    fn step(&mut self) -> Result<Option<Task>, KernelError> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        while let Some(threads) = &mut self.threads {
            let Some(task) = next(threads, &mut self.reader, &mut self.left)? else {
                self.threads = None;
                break;
            };
            // The leader came first.
            if task.tid != task.pid {
                return Ok(Some(task));
            }
        }
        let Some(task) = next(&mut self.leaders, &mut self.reader, &mut self.left)? else {
            return Ok(None);
        };
        if self.which == Which::Threads {
            match self.reader.threads(task.gva) {
                Ok(threads) => self.threads = Some(threads),
                Err(error) => self.error = Some(error),
            }
        }
        Ok(Some(task))
    }
}

/// The next task of a list; `left` is how many nodes may follow, also those that cannot be read.
fn next(
    list: &mut List<'_>,
    reader: &mut Reader<'_>,
    left: &mut usize,
) -> Result<Option<Task>, KernelError> {
    let found = list.next_with(|gva| reader.task(gva));
    if !matches!(found, Ok(None)) {
        let what = "8 million nodes of lists of tasks, or the limit that was set";
        *left = left.checked_sub(1).ok_or(KernelError::TooMuch { what })?;
    }
    Ok(found?.map(|(task, is_torn)| Task { is_torn: task.is_torn || is_torn, ..task }))
}

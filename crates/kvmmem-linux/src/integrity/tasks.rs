// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tasks of two places: the lists of processes and of their threads, which /proc and ps show,
//! and the pids (`init_pid_ns.idr`), where kill and the scheduler's system calls find them.

use super::finding::{Finding, Report};
use crate::bytes::Bytes;
use crate::kernel::{Kernel, KernelError};

/// The places, as a finding names them.
const IN_LISTS: &str = "the lists of tasks";
const IN_PIDS: &str = "the table of pids";

/// The most tasks (`PID_MAX_LIMIT`), and nodes of a tree of so many pids.
const MAX_TASKS: usize = 4 << 20;
const MAX_NODES: usize = MAX_TASKS / 64 * 2;

/// Bytes of a task's name.
const COMM_LEN: u64 = 16;

/// Nodes of a tree (`include/linux/xarray.h`): pointers to them are marked by 2, and numbers up to
/// 4,096 with that mark mean something else. A node has 64 slots.
const MARK: u64 = 3;
const NODE: u64 = 2;
const MAX_RESERVED: u64 = 4096;
const SLOTS: u64 = 64;
const SLOT_BITS: u8 = 6;

/// The most tasks that are found in one place alone: with more, the two do not belong together.
const MAX_HIDDEN: usize = 1000;

pub(super) fn check(kernel: &Kernel<'_>) -> Result<Report, KernelError> {
    let (listed, with_pids) = (listed(kernel)?, with_pids(kernel)?);
    let mut report = Report { examined: listed.len().max(with_pids.len()), findings: Vec::new() };
    report.findings.extend(missing(kernel, &with_pids, &listed, (IN_PIDS, IN_LISTS))?);
    report.findings.extend(missing(kernel, &listed, &with_pids, (IN_LISTS, IN_PIDS))?);
    Ok(report)
}

/// Those of one place that the other has not; both are ascending.
fn missing(
    kernel: &Kernel<'_>,
    one: &[u64],
    other: &[u64],
    (found, missing): (&'static str, &'static str),
) -> Result<Vec<Finding>, KernelError> {
    let names = Names::new(kernel)?;
    let mut findings = Vec::new();
    for gva in one.iter().copied().filter(|gva| other.binary_search(gva).is_err()) {
        if findings.len() >= MAX_HIDDEN {
            let what =
                format!("more than {MAX_HIDDEN} tasks that are in {found} and not in {missing}");
            return Err(KernelError::Malformed { what, gva });
        }
        findings.push(Finding::Hidden { name: names.of(kernel, gva)?, gva, found, missing });
    }
    Ok(findings)
}

/// The tasks of the lists, ascending.
fn listed(kernel: &Kernel<'_>) -> Result<Vec<u64>, KernelError> {
    let signal = kernel.offset("task_struct", "signal")?;
    let threads = kernel.offset("signal_struct", "thread_head")?;
    let leaders = kernel.symbol("init_task")?.wrapping_add(kernel.offset("task_struct", "tasks")?);
    let mut found = Vec::new();
    for leader in kernel.list_of(leaders, "task_struct", "tasks")? {
        let leader = leader?;
        found.push(leader);
        let head = kernel.read_u64(leader.wrapping_add(signal))?.wrapping_add(threads);
        for thread in kernel.list_of(head, "task_struct", "thread_node")? {
            found.push(thread?);
            if found.len() > 2 * MAX_TASKS {
                return Err(too_many(head));
            }
        }
    }
    found.sort_unstable();
    // A leader is one of its threads.
    found.dedup();
    Ok(found)
}

/// The tasks of the pids, ascending.
fn with_pids(kernel: &Kernel<'_>) -> Result<Vec<u64>, KernelError> {
    let root = kernel.offset("pid_namespace", "idr.idr_rt.xa_head")?;
    // The first of several kinds: of the process or thread itself.
    let (tasks, links) =
        (kernel.offset("pid", "tasks")?, kernel.offset("task_struct", "pid_links")?);
    let mut found = Vec::new();
    for pid in entries(kernel, kernel.symbol("init_pid_ns")?.wrapping_add(root))? {
        let first = kernel.read_u64(pid.wrapping_add(tasks))?;
        // Its task has ended, or is not there yet.
        if first != 0 {
            found.push(first.wrapping_sub(links));
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// The pointers in the tree whose root is at `root`.
fn entries(kernel: &Kernel<'_>, root: u64) -> Result<Vec<u64>, KernelError> {
    let (shift_at, slots_at) =
        (kernel.offset("xa_node", "shift")?, kernel.offset("xa_node", "slots")?);
    let malformed = |gva| KernelError::Malformed { what: "the tree of pids".to_owned(), gva };
    let mut nodes = Vec::new();
    let mut pids = Vec::new();
    let mut add =
        |entry: u64, shift: Option<u8>, nodes: &mut Vec<(u64, u8)>| match (entry & MARK, shift) {
            _ if entry == 0 => Ok(()),
            (0, None | Some(0)) => {
                pids.push(entry);
                Ok(())
            }
            (NODE, _) if entry <= MAX_RESERVED => Ok(()),
            // A node of the lowest level has no nodes below it.
            (NODE, shift) if shift != Some(0) => {
                nodes.push((entry - NODE, shift.unwrap_or(u8::MAX)));
                Ok(())
            }
            _ => Err(malformed(root)),
        };
    add(kernel.read_u64(root)?, None, &mut nodes)?;
    let mut left = MAX_NODES;
    while let Some((node, above)) = nodes.pop() {
        left = left.checked_sub(1).ok_or_else(|| too_many(root))?;
        let shift = kernel.read_u8(node.wrapping_add(shift_at))?;
        let is_below = if above == u8::MAX {
            shift <= 60
        } else {
            shift.checked_add(SLOT_BITS) == Some(above)
        };
        if !is_below || !shift.is_multiple_of(SLOT_BITS) {
            return Err(malformed(node));
        }
        let mut slots = Bytes::zeroed(SLOTS * 8);
        kernel.read(node.wrapping_add(slots_at), slots.as_mut())?;
        for slot in 0..SLOTS {
            add(slots.u64(slot * 8), Some(shift), &mut nodes)?;
        }
    }
    Ok(pids)
}

/// Where a task has what it is called by.
struct Names {
    pid: u64,
    tgid: u64,
    comm: u64,
}

impl Names {
    fn new(kernel: &Kernel<'_>) -> Result<Self, KernelError> {
        let task = |member| kernel.offset("task_struct", member);
        Ok(Self { pid: task("pid")?, tgid: task("tgid")?, comm: task("comm")? })
    }

    fn of(&self, kernel: &Kernel<'_>, task: u64) -> Result<String, KernelError> {
        let number = |at: u64| kernel.read_u32(task.wrapping_add(at));
        let (pid, tgid) = (number(self.pid)?, number(self.tgid)?);
        let mut comm = Bytes::zeroed(COMM_LEN);
        kernel.read(task.wrapping_add(self.comm), comm.as_mut())?;
        let comm = comm.string(0, COMM_LEN);
        Ok(if pid == tgid {
            format!("process {pid} ({comm})")
        } else {
            format!("thread {pid} of process {tgid} ({comm})")
        })
    }
}

fn too_many(gva: u64) -> KernelError {
    KernelError::Malformed { what: "more than 4 million tasks".to_owned(), gva }
}

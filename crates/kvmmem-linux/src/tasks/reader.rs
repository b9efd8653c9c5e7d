// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads tasks.

use std::time::Duration;

use kvmmem_memory::PAGE_SIZE;

use super::layout::{Kthread, Layout};
use super::task::{Args, Task};
use crate::bytes::{Bytes, text};
use crate::kernel::{Kernel, KernelError, List};

/// The highest process id that Linux gives (`PID_MAX_LIMIT`).
const MAX_PID: u32 = 4 << 20;

/// The longest command line that is read, bytes.
const MAX_ARGS: u64 = 128 << 10;

/// Reads of a task that changes.
const TRIES: u32 = 3;

/// Bytes of a task's and of a worker's name.
const COMM_LEN: u64 = 16;
const DESC_LEN: u64 = 32;
/// The longest name of a kernel thread that is read.
const FULL_NAME_LEN: usize = 256;

/// Flags of a task.
const PF_EXITING: u32 = 0x4;
const PF_WQ_WORKER: u32 = 0x20;
const PF_KTHREAD: u32 = 0x20_0000;

/// States of a task: `TASK_IDLE`, and what /proc reports of the others, each a letter for a bit.
const IDLE: u32 = 0x402;
const REPORTED: u32 = 0x7f;
const LETTERS: [char; 8] = ['R', 'S', 'D', 'T', 't', 'X', 'Z', 'P'];
/// Sleeps that count as uninterruptible: waiting for a lock of PREEMPT_RT, and frozen.
const LIKE_D: u32 = 0x1000 | 0x8000;

/// Where everything is in a task, and how many bytes further command lines may take.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    kernel: &'a Kernel<'a>,
    layout: Layout,
    args_left: u64,
}

impl<'a> Reader<'a> {
    pub(super) fn new(kernel: &'a Kernel<'a>, layout: Layout, args_left: u64) -> Self {
        Self { kernel, layout, args_left }
    }

    /// The threads of a process, by its leader.
    pub(super) fn threads(&self, leader: u64) -> Result<List<'a>, KernelError> {
        let signal = self.kernel.read_u64(leader.wrapping_add(self.layout.signal))?;
        self.kernel.list_of(
            signal.wrapping_add(self.layout.thread_head),
            "task_struct",
            "thread_node",
        )
    }

    /// A task.
    pub(super) fn task(&mut self, gva: u64) -> Result<Task, KernelError> {
        let (mut last, mut is_torn) = (None, false);
        for _ in 0..TRIES {
            let bytes = self.bytes(gva)?;
            let task = self.describe(gva, &bytes);
            // What it was made of must still be there.
            let again = self.bytes(gva)?;
            let key = |bytes: &Bytes| {
                let Layout { pid, tgid, real_parent, cred, mm, start, comm, .. } = self.layout;
                let words = [real_parent, cred, mm, start].map(|at| bytes.u64(at));
                (bytes.u32(pid), bytes.u32(tgid), words, bytes.part(comm, COMM_LEN))
            };
            is_torn = key(&bytes) != key(&again);
            last = Some(task);
            if !is_torn && matches!(last, Some(Ok(_))) {
                break;
            }
        }
        let mut task = last.unwrap_or_else(|| Err(malformed(gva)))?;
        task.is_torn = is_torn;
        self.args_left = self.args_left.saturating_sub(task.args.size() as u64);
        Ok(task)
    }

    fn bytes(&self, gva: u64) -> Result<Bytes, KernelError> {
        Bytes::read(self.kernel, gva, self.layout.len)
    }

    fn describe(&self, gva: u64, bytes: &Bytes) -> Result<Task, KernelError> {
        let layout = &self.layout;
        let (tid, pid) = (bytes.u32(layout.pid), bytes.u32(layout.tgid));
        if !(1..=MAX_PID).contains(&tid) || !(1..=MAX_PID).contains(&pid) {
            return Err(malformed(gva));
        }
        let flags = bytes.u32(layout.flags);
        let is_kernel = flags & PF_KTHREAD != 0;
        let exit_state = bytes.u32(layout.exit_state);
        let has_usage = layout.usage.is_none_or(|usage| bytes.u32(usage) != 0);
        let mut is_damaged = !bytes.is_whole() || !has_usage;
        let mut comm = bytes.string(layout.comm, COMM_LEN);
        if let Some(kthread) = layout.kthread.as_ref().filter(|_| is_kernel) {
            match self.kernel_name(gva, bytes, kthread, flags, comm.clone()) {
                Ok(name) => comm = name,
                // The names of a thread that is ending are freed before it is.
                Err(_) if exit_state != 0 => {}
                Err(_) => is_damaged = true,
            }
        }
        let mm = bytes.u64(layout.mm);
        let mut args = Args::default();
        // A process has memory until it ends.
        is_damaged |= mm == 0 && !is_kernel && exit_state == 0 && flags & PF_EXITING == 0;
        if mm != 0 && !is_kernel && tid == pid {
            match self.args(mm) {
                Ok(found) => args = found,
                Err(_) => {
                    args.is_cut = true;
                    is_damaged = true;
                }
            }
        }
        let ids = self.ids(bytes.u64(layout.cred)).ok();
        let ppid = self.parent(bytes.u64(layout.real_parent)).ok();
        let has_state = bytes.has(layout.state, 4) && bytes.has(layout.exit_state, 4) && has_usage;
        // Only the idle task began at 0.
        let start =
            Some(bytes.u64(layout.start)).filter(|start| *start != 0).map(Duration::from_nanos);
        Ok(Task {
            gva,
            tid,
            pid,
            ppid,
            uid: ids.map(|[uid, ..]| uid),
            euid: ids.map(|[_, euid, _]| euid),
            gid: ids.map(|[.., gid]| gid),
            state: if has_state { state(bytes.u32(layout.state), exit_state) } else { '?' },
            start,
            is_kernel,
            args,
            is_torn: false,
            // Each has a name.
            is_damaged: is_damaged
                || ids.is_none()
                || ppid.is_none()
                || start.is_none()
                || comm.is_empty(),
            comm,
        })
    }

    /// Real and effective user, and real group, of a `struct cred`.
    fn ids(&self, cred: u64) -> Result<[u32; 3], KernelError> {
        let number = |at: u64| self.kernel.read_u32(cred.wrapping_add(at));
        let ids = [number(self.layout.uid)?, number(self.layout.euid)?, number(self.layout.gid)?];
        if let Some((user, uid)) = self.layout.user {
            let user = self.kernel.read_u64(cred.wrapping_add(user))?;
            // Both name the owner.
            if self.kernel.read_u32(user.wrapping_add(uid))? != ids[0] {
                return Err(KernelError::Malformed {
                    what: "the user of a task".to_owned(),
                    gva: cred,
                });
            }
        }
        Ok(ids)
    }

    /// The id of the process that a task belongs to; `parent` is that task.
    fn parent(&self, parent: u64) -> Result<u32, KernelError> {
        let pid = self.kernel.read_u32(parent.wrapping_add(self.layout.tgid))?;
        // 0 is that of the idle task alone.
        if pid > MAX_PID || pid == 0 && parent != self.kernel.symbol("init_task")? {
            return Err(malformed(parent));
        }
        Ok(pid)
    }

    /// The full name of a kernel thread; that of a worker has what it works on (wq_worker_comm() of
    /// the kernel).
    fn kernel_name(
        &self,
        gva: u64,
        task: &Bytes,
        at: &Kthread,
        flags: u32,
        comm: String,
    ) -> Result<String, KernelError> {
        let kthread = task.u64(at.worker_private);
        if kthread == 0 {
            return Ok(comm);
        }
        let malformed = || KernelError::Malformed {
            what: "the name of a thread of the kernel".to_owned(),
            gva: kthread,
        };
        if let Some(parked) = at.parked
            && self.kernel.read_u64(kthread.wrapping_add(parked))? == 0
        {
            return Err(malformed());
        }
        let mut name = comm;
        if at.full_name != 0 {
            let full = self.kernel.read_u64(kthread.wrapping_add(at.full_name))?;
            if full != 0 {
                // A task's own name is the first part of it.
                let full = text(&self.kernel.read_cstr(full, FULL_NAME_LEN)?);
                name = if full.starts_with(&name) { full } else { return Err(malformed()) };
            }
        }
        if flags & PF_WQ_WORKER != 0 {
            let worker = self.kernel.read_u64(kthread.wrapping_add(at.data))?;
            if let Some(task) = at.task
                && self.kernel.read_u64(worker.wrapping_add(task))? != gva
            {
                return Err(malformed());
            }
            let pool = self.kernel.read_u64(worker.wrapping_add(at.pool))?;
            let mut desc = Bytes::zeroed(DESC_LEN);
            self.kernel.read(worker.wrapping_add(at.desc), desc.as_mut())?;
            let desc = desc.string(0, DESC_LEN);
            if pool != 0 && !desc.is_empty() {
                let is_working = self.kernel.read_u64(worker.wrapping_add(at.current_work))? != 0;
                name.push(if is_working { '+' } else { '-' });
                name.push_str(&desc);
            }
        }
        Ok(name)
    }

    /// The command line, as far as it is in memory (get_mm_cmdline() of the kernel).
    fn args(&self, mm: u64) -> Result<Args, KernelError> {
        let word = |at: u64| self.kernel.read_u64(mm.wrapping_add(at));
        let (start, end) = (word(self.layout.arg_start)?, word(self.layout.arg_end)?);
        let env_end = word(self.layout.env_end)?;
        // A program begins with both.
        if start == 0 || end < start {
            return Err(KernelError::Malformed {
                what: "the memory of a process".to_owned(),
                gva: mm,
            });
        }
        let space = self.kernel.process_space(word(self.layout.pgd)?)?;
        let len = end.saturating_sub(start);
        let most = len.min(MAX_ARGS).min(self.args_left);
        let mut bytes = space.read_some(start, most);
        let is_cut = (bytes.len() as u64) < len;
        // A program may have written one string over all of its words, and over its environment as
        // well.
        if !is_cut && bytes.last().is_some_and(|last| *last != 0) {
            let more = space.read_some(end, env_end.saturating_sub(end).min(PAGE_SIZE as u64));
            bytes.extend_from_slice(&more);
            bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
            bytes.push(0);
        }
        Ok(Args::new(&bytes, is_cut))
    }
}

fn malformed(gva: u64) -> KernelError {
    KernelError::Malformed { what: "the task".to_owned(), gva }
}

/// The letter of a state (task_state_index() of the kernel).
fn state(state: u32, exit_state: u32) -> char {
    if state & IDLE == IDLE {
        return 'I';
    }
    let bits = if state & LIKE_D != 0 { 2 } else { (state | exit_state) & REPORTED };
    let index = usize::try_from(u32::BITS - bits.leading_zeros()).unwrap_or(0);
    LETTERS.get(index).copied().unwrap_or('?')
}

#[cfg(test)]
mod tests {
    use super::state;

    #[test]
    fn states_have_the_letters_of_proc() {
        let cases = [
            (0, 0, 'R'),
            (1, 0, 'S'),
            (2, 0, 'D'),
            (4, 0, 'T'),
            (8, 0, 't'),
            (0, 0x20, 'Z'),
            (0x80, 0x10, 'X'),
        ];
        for (bits, exit, letter) in cases {
            assert_eq!(state(bits, exit), letter);
        }
        assert_eq!(state(0x402, 0), 'I');
        assert_eq!(state(0x40, 0), 'P');
        assert_eq!(state(0x8000, 0), 'D');
        assert_eq!(state(0x102, 0), 'D');
    }
}

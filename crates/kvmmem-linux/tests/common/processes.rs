// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A kernel with processes as Linux has them, and memory that changes while it is read.

use std::sync::atomic::{AtomicU64, Ordering};

use kvmmem_memory::{Memory, MemoryError, Range};

use super::btf::Builder;
use super::{BTF, Guest, NAMES, PAGE_TABLES, Place, TASKS};

/// Places in the image: tasks but the first, and what all have in common.
const OTHERS: u64 = 0x20_0000;
pub(crate) const CRED: u64 = 0x21_0000;

const USER: u64 = 0x21_1000;
const SIGNAL: u64 = 0x21_2000;
const MM: u64 = 0x21_3000;
const THREADS: u64 = 0x22_0000;
const ZEROS: u64 = 0x30_0000;

/// The flag of the kernel's own tasks.
const PF_KTHREAD: u32 = 0x20_0000;

/// Members of `struct task_struct`.
const THREAD_NODE: u64 = 16;
const SIGNAL_AT: u64 = 32;
const MM_AT: u64 = 104;
pub(crate) const PID: u64 = 40;
pub(crate) const COMM: u64 = 56;
const TGID: u64 = 44;
const PARENT: u64 = 48;
const FLAGS: u64 = 72;
const STATE: u64 = 76;
pub(crate) const USAGE: u64 = 84;
const CRED_AT: u64 = 88;
pub(crate) const START: u64 = 96;

/// What `list_del_rcu()` of the kernel leaves in the pointer to the node before.
const LIST_POISON2: u64 = 0xdead_0000_0000_0122;

/// A guest that runs the processes of [`NAMES`].
pub(crate) fn guest() -> Guest {
    let guest = Guest::with(&[Place::FIRST]);
    let Place { gpa, gva, .. } = Place::FIRST;
    guest.put(gpa + BTF, &types());
    guest.put(gpa + CRED, &[1000_u32, 1001, 1002].map(u32::to_le_bytes).concat());
    guest.put_word(gpa + CRED + 16, gva + USER);
    guest.put(gpa + USER, &1000_u32.to_le_bytes());
    for (n, (pid, name)) in NAMES.iter().enumerate() {
        let task = gpa + task(n);
        guest.put(task, &[0; 0x100]);
        guest.put_word(task, gva + self::task(n + 1));
        guest.put_word(task + 8, gva + self::task(n + NAMES.len() - 1));
        guest.put(task + PID, &pid.to_le_bytes());
        guest.put(task + TGID, &pid.to_le_bytes());
        guest.put_word(task + PARENT, gva + self::task(0));
        guest.put(task + COMM, name.as_bytes());
        guest.put(task + FLAGS, &PF_KTHREAD.to_le_bytes());
        guest.put(task + STATE, &1_u32.to_le_bytes());
        guest.put(task + USAGE, &1_u32.to_le_bytes());
        guest.put_word(task + CRED_AT, gva + CRED);
        guest.put_word(task + START, 1_000_000_000 + u64::from(*pid));
    }
    guest
}

/// Where a task is in the image.
pub(crate) fn task(n: usize) -> u64 {
    match n % NAMES.len() {
        0 => TASKS,
        n => OTHERS + 0x1000 * n as u64,
    }
}

/// Gives all processes the same list of this many threads.
pub(crate) fn share_threads(guest: &Guest, count: u64) {
    let Place { gpa, gva, .. } = Place::FIRST;
    (1..NAMES.len()).for_each(|n| guest.put_word(gpa + task(n) + SIGNAL_AT, gva + SIGNAL));
    let nodes: Vec<u64> =
        [SIGNAL].into_iter().chain((0..count).map(|n| thread(n) + THREAD_NODE)).collect();
    for (n, node) in nodes.iter().enumerate() {
        guest.put_word(gpa + node, gva + nodes[(n + 1) % nodes.len()]);
        guest.put_word(gpa + node + 8, gva + nodes[(n + nodes.len() - 1) % nodes.len()]);
    }
    for n in 0..count {
        guest.put(gpa + thread(n) + PID, &u32::try_from(100 + n).unwrap().to_le_bytes());
        guest.put(gpa + thread(n) + TGID, &1_u32.to_le_bytes());
    }
}

/// Gives all processes the same memory, with a command line of so many empty words.
pub(crate) fn share_memory(guest: &Guest, words: u64) {
    let Place { gpa, gva, .. } = Place::FIRST;
    for n in 1..NAMES.len() {
        guest.put(gpa + task(n) + FLAGS, &[0; 4]);
        guest.put_word(gpa + task(n) + MM_AT, gva + MM);
    }
    // Its page tables are the kernel's, of which the command line is a part that is zeros.
    let mm = [PAGE_TABLES, ZEROS, ZEROS + words, ZEROS + words];
    guest.put(gpa + MM, &mm.map(|at| (gva + at).to_le_bytes()).concat());
}

/// Where a thread is in the image.
pub(crate) fn thread(n: u64) -> u64 {
    THREADS + 0x100 * n
}

/// Ends a process: takes it out of the list, and gives its memory to something else.
pub(crate) fn end(guest: &Guest, n: usize) {
    let Place { gpa, gva, .. } = Place::FIRST;
    let (before, after) = (task(n + NAMES.len() - 1), task(n + 1));
    guest.put_word(gpa + before, gva + after);
    guest.put_word(gpa + after + 8, gva + before);
    guest.put_word(gpa + task(n) + 8, LIST_POISON2);
    guest.put(gpa + task(n) + PID, &[0xff; 32]);
}

fn types() -> Vec<u8> {
    let mut btf = Builder::default();
    let (char, int, word) = (btf.int("char", 1), btf.int("int", 4), btf.int("long", 8));
    let text = btf.array(char, 16);
    let list = btf.structure(4, "list_head", 16, &[("next", word, 0, 0), ("prev", word, 64, 0)]);
    let place = |at: u64| u32::try_from(at * 8).unwrap();
    btf.structure(
        4,
        "task_struct",
        0x100,
        &[
            ("tasks", list, 0, 0),
            ("thread_node", list, place(THREAD_NODE), 0),
            ("signal", word, place(SIGNAL_AT), 0),
            ("pid", int, place(PID), 0),
            ("tgid", int, place(TGID), 0),
            ("real_parent", word, place(PARENT), 0),
            ("comm", text, place(COMM), 0),
            ("flags", int, place(FLAGS), 0),
            ("__state", int, place(STATE), 0),
            ("exit_state", int, place(80), 0),
            ("usage", int, place(USAGE), 0),
            ("cred", word, place(CRED_AT), 0),
            ("start_boottime", word, place(START), 0),
            ("mm", word, place(MM_AT), 0),
        ],
    );
    btf.structure(4, "signal_struct", 16, &[("thread_head", list, 0, 0)]);
    let cred =
        [("uid", int, 0, 0), ("euid", int, 32, 0), ("gid", int, 64, 0), ("user", word, 128, 0)];
    btf.structure(4, "cred", 24, &cred);
    btf.structure(4, "user_struct", 4, &[("uid", int, 0, 0)]);
    let words = ["pgd", "arg_start", "arg_end", "env_end"];
    let members: Vec<_> = (0..).zip(words).map(|(n, name)| (name, word, 64 * n, 0)).collect();
    btf.structure(4, "mm_struct", 32, &members);
    btf.build()
}

/// What happens after each read of an address, which is counted.
pub(crate) type Change<'g> = &'g (dyn Fn(&Guest, u64) + Sync);

/// Memory that changes in the same way in each run: each time the byte at an address is read.
pub(crate) struct ChangingMemory<'g> {
    pub(crate) guest: &'g Guest,
    pub(crate) at: u64,
    pub(crate) change: Change<'g>,
    pub(crate) reads: AtomicU64,
}

impl Memory for ChangingMemory<'_> {
    fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.guest.read_at(gpa, buf)?;
        if (gpa..gpa + buf.len() as u64).contains(&self.at) {
            (self.change)(self.guest, self.reads.fetch_add(1, Ordering::Relaxed));
        }
        Ok(())
    }

    fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
        self.guest.ranges()
    }
}

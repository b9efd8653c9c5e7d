// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker remembers in a file, so that a new one knows it: the VMs that an operator has
//! added. Those that register themselves do so again by themselves; grants and tokens end with the
//! broker.

pub(crate) mod entry;
mod file;
mod restore;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use kvmmem_qemu::process::Process;

use crate::core::limits::MAX_VMS;
use crate::registry::Vm;
use crate::sync::lock;
use entry::Entry;
use file::StateFile;

/// The VMs that were added. Remembers none of them before it has a file.
#[derive(Debug, Default)]
pub(crate) struct State {
    memory: Mutex<Option<Memory>>,
    /// Locked after `memory`.
    generations: Mutex<Generations>,
    is_brief: AtomicBool,
}

#[derive(Debug)]
struct Memory {
    file: StateFile,
    /// Those that are registered, by number.
    live: BTreeMap<u64, Entry>,
    /// Those of a broker before that have not been added again.
    waiting: Vec<Entry>,
}

impl State {
    /// Remembers from now on in a folder, which is made; what is there waits to be added again.
    ///
    /// # Errors
    /// Where nothing can be written there, or the system does not read what is there. A file that
    /// makes no sense is reported and ignored.
    pub(super) fn open(&self, directory: &Path) -> io::Result<Vec<Entry>> {
        let (file, waiting) = StateFile::open(directory)?;
        let mut generations = self.generations();
        for entry in waiting.iter().filter(|entry| entry.generation > 0) {
            generations.note((entry.pid, entry.started), entry.generation);
        }
        drop(generations);
        *lock(&self.memory) =
            Some(Memory { file, live: BTreeMap::new(), waiting: waiting.clone() });
        Ok(waiting)
    }

    /// Remembers a VM that was added, or what has changed of it.
    pub(crate) fn remember(&self, vm: &Vm, entry: Option<Entry>) {
        let mut state = lock(&self.memory);
        if let Some(entry) = entry.as_ref().filter(|entry| entry.generation > 0) {
            self.generations().note((entry.pid, entry.started), entry.generation);
        }
        let (Some(memory), Some(entry)) = (&mut *state, entry) else { return };
        memory.waiting.retain(|other| !other.is_same(&entry));
        memory.live.insert(vm.id(), entry);
        // It is marked first and forgotten then.
        if vm.is_gone() {
            memory.live.remove(&vm.id());
        }
        memory.write();
    }

    /// Remembers the generation that the RAM of a VM has by now.
    pub(crate) fn changed(&self, vm: &Vm, generation: u64) {
        let mut state = lock(&self.memory);
        let pid = vm.peer().credentials().pid;
        if let Some(started) = Process::open(pid).ok().and_then(|process| process.started()) {
            self.generations().note((pid, started), generation);
        }
        if let Some(memory) = &mut *state
            && let Some(entry) = memory.live.get_mut(&vm.id())
        {
            entry.generation = generation;
            memory.write();
        }
    }

    /// The generation that the RAM of a process's VM had when it was a target last.
    pub(crate) fn generation(&self, pid: u32) -> Option<u64> {
        let process = Process::open(pid).ok()?;
        let known = self.generations().0.get(&(pid, process.started()?)).copied();
        known.or_else(|| {
            self.is_brief.load(Ordering::Relaxed).then(|| derived_generation(&process))?
        })
    }

    /// Gives the RAM of a process the same generation in each broker, as no broker lasts from one
    /// command to the next.
    pub(crate) fn set_brief(&self) {
        self.is_brief.store(true, Ordering::Relaxed);
    }

    /// Forgets a VM, if it was added.
    pub(crate) fn forget(&self, vm: u64) {
        if let Some(memory) = &mut *lock(&self.memory)
            && memory.live.remove(&vm).is_some()
        {
            memory.write();
        }
    }

    /// Leaves the file as it is: the broker ends, not the VMs.
    pub(crate) fn close(&self) {
        *lock(&self.memory) = None;
    }

    /// Whether one of a broker before still waits to be added again.
    fn is_waiting(&self, entry: &Entry) -> bool {
        lock(&self.memory).as_ref().is_some_and(|memory| memory.waiting.contains(entry))
    }

    /// Forgets one of a broker before.
    fn give_up(&self, entry: &Entry) {
        if let Some(memory) = &mut *lock(&self.memory) {
            memory.waiting.retain(|other| other != entry);
            memory.write();
        }
    }

    fn generations(&self) -> MutexGuard<'_, Generations> {
        lock(&self.generations)
    }
}

/// A number that only this process has, exact in JSON.
fn derived_generation(process: &Process) -> Option<u64> {
    let identity = process.identity()?;
    let word = identity.last_chunk().copied().map(u64::from_le_bytes)?;
    Some(word >> 12 | 1)
}

/// The generations of RAM by process, which outlast the targets: one that is removed and added
/// again has its generation.
#[derive(Debug, Default)]
struct Generations(BTreeMap<(u32, u64), u64>);

impl Generations {
    fn note(&mut self, process: (u32, u64), generation: u64) {
        if self.0.len() >= 2 * MAX_VMS {
            let lives = |(pid, started): &(u32, u64)| {
                Process::open(*pid).is_ok_and(|process| process.started() == Some(*started))
            };
            self.0.retain(|process, _| lives(process));
        }
        if self.0.len() < 2 * MAX_VMS || self.0.contains_key(&process) {
            self.0.insert(process, generation);
        }
    }
}

impl Memory {
    fn write(&mut self) {
        self.file.write(self.live.values().chain(&self.waiting));
    }
}

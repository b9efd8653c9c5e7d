// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker remembers in a file, so that a new one knows it: the VMs that an operator has added. Those that
//! register themselves do so again by themselves; grants and tokens end with the broker.

mod file;
mod restore;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::discover::process::{FileId, Process};
use crate::registry::Vm;
use crate::wire::OnSilence;
use file::StateFile;

/// A VM that was added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) uuid: Uuid,
    /// Its VMM's process.
    pub(crate) pid: u32,
    /// When that was started, clock ticks since the host was: with this, nobody who gets its number is taken for it.
    pub(crate) started: u64,
    /// The monitor by which it was added.
    pub(crate) qmp: Option<PathBuf>,
    pub(crate) role: Role,
}

/// What it was added as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    /// A target, whose RAM is in these files; in none where it is private.
    Target { files: Vec<FileId> },
    /// An introspector.
    Introspector { cid: u32, on_silence: OnSilence },
}

impl Entry {
    /// A VM that is registered; `None` where its VMM has ended.
    pub(crate) fn of(vm: &Vm, qmp: Option<PathBuf>, role: Role) -> Option<Self> {
        let pid = vm.peer().credentials().pid;
        let started = Process::open(pid).ok()?.started()?;
        let registration = vm.registration();
        Some(Self { name: registration.name.clone(), uuid: registration.uuid, pid, started, qmp, role })
    }

    /// Whether both are of one VM in one role.
    fn is_same(&self, other: &Self) -> bool {
        let is_target = |entry: &Self| matches!(entry.role, Role::Target { .. });
        (self.pid, self.started, is_target(self)) == (other.pid, other.started, is_target(other))
    }
}

impl Role {
    /// A target's.
    pub(crate) fn target(vm: &Vm) -> Self {
        let files = vm.ram().map(|ram| ram.files().into_iter().filter_map(FileId::of_file).collect());
        Self::Target { files: files.unwrap_or_default() }
    }
}

/// The VMs that were added. Remembers nothing before it has a file.
#[derive(Debug, Default)]
pub(crate) struct State(Mutex<Option<Memory>>);

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
    /// Where nothing can be written there. What is no memory of a broker is told and counts for nothing.
    fn open(&self, directory: &Path) -> io::Result<Vec<Entry>> {
        let (file, waiting) = StateFile::open(directory)?;
        *self.lock() = Some(Memory { file, live: BTreeMap::new(), waiting: waiting.clone() });
        Ok(waiting)
    }

    /// Remembers a VM that was added, or what has changed of it.
    pub(crate) fn remember(&self, vm: &Vm, entry: Option<Entry>) {
        let mut state = self.lock();
        let (Some(memory), Some(entry)) = (&mut *state, entry) else { return };
        memory.waiting.retain(|other| !other.is_same(&entry));
        memory.live.insert(vm.id(), entry);
        // It is marked first and forgotten then.
        if vm.is_gone() {
            memory.live.remove(&vm.id());
        }
        memory.write();
    }

    /// Forgets a VM, if it was added.
    pub(crate) fn forget(&self, vm: u64) {
        if let Some(memory) = &mut *self.lock()
            && memory.live.remove(&vm).is_some()
        {
            memory.write();
        }
    }

    /// Leaves the file as it is: the broker ends, not the VMs.
    pub(crate) fn close(&self) {
        *self.lock() = None;
    }

    /// Whether one of a broker before still waits to be added again.
    fn is_waiting(&self, entry: &Entry) -> bool {
        self.lock().as_ref().is_some_and(|memory| memory.waiting.contains(entry))
    }

    /// Forgets one of a broker before.
    fn give_up(&self, entry: &Entry) {
        if let Some(memory) = &mut *self.lock() {
            memory.waiting.retain(|other| other != entry);
            memory.write();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Memory>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    fn write(&mut self) {
        self.file.write(self.live.values().chain(&self.waiting));
    }
}

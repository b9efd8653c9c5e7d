// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One VM that was added, as it is remembered.

use std::path::PathBuf;

use kvmmem_proto::message::OnSilence;
use kvmmem_qemu::file_id::FileId;
use kvmmem_qemu::process::Process;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::registry::Vm;

/// A VM that was added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) uuid: Uuid,
    /// Its VMM's process.
    pub(crate) pid: u32,
    /// When that was started, clock ticks since the host was: it tells a later process with the
    /// same number from it.
    pub(crate) started: u64,
    /// The monitor by which it was added.
    pub(crate) qmp: Option<PathBuf>,
    /// The generation of its RAM; 0 where it is not known.
    #[serde(default)]
    pub(crate) generation: u64,
    pub(crate) role: Role,
}

/// What it was added as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    /// A target, whose RAM is in these files; in none where it is private.
    Target { files: Vec<FileId> },
    /// An introspector.
    Introspector {
        cid: u32,
        on_silence: OnSilence,
        #[serde(default)]
        trusted: bool,
    },
}

impl Entry {
    /// A VM that is registered; `None` where its VMM has ended.
    pub(crate) fn of(vm: &Vm, qmp: Option<PathBuf>, role: Role) -> Option<Self> {
        let pid = vm.peer().credentials().pid;
        let started = Process::open(pid).ok()?.started()?;
        let identity = vm.identity();
        let generation = vm.ram().map_or(0, |ram| ram.layout().generation);
        Some(Self {
            name: identity.name.clone(),
            uuid: identity.uuid,
            pid,
            started,
            qmp,
            generation,
            role,
        })
    }

    /// Whether both are of one VM in one role.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let is_target = |entry: &Self| matches!(entry.role, Role::Target { .. });
        (self.pid, self.started, is_target(self)) == (other.pid, other.started, is_target(other))
    }
}

impl Role {
    /// A target's.
    pub(crate) fn target(vm: &Vm) -> Self {
        let files =
            vm.ram().map(|ram| ram.files().into_iter().filter_map(FileId::of_file).collect());
        Self::Target { files: files.unwrap_or_default() }
    }
}

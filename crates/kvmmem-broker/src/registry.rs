// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A registered VM with what the core does not have: its RAM's files, its VMM's connection and its
//! hooks.
//!
//! Any thread may have a [`Vm`], and have it past the VM's end: a hook that has not ended yet does,
//! and so does the pause of an operator. So the end of a VM takes its RAM out: the last close of a
//! memfd frees the memory, which takes long where that is large.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use kvmmem_proto::map::Region;
use kvmmem_proto::message::{TargetInfo, VmIdentity};

use crate::core::call_error::CallError;
use crate::core::vms::RegisterError;
use crate::hook::Hooks;
use crate::peer::Peer;
use crate::ram::Ram;
use crate::sync::lock;

/// A registered VM.
#[derive(Debug)]
pub(crate) struct Vm {
    id: u64,
    identity: Arc<VmIdentity>,
    /// Locked last: no other lock is taken while it is held.
    ram: Mutex<Option<Arc<Ram>>>,
    peer: Arc<Peer>,
    hooks: Hooks,
    gone: AtomicBool,
}

impl Vm {
    pub(crate) fn new(
        id: u64,
        identity: Arc<VmIdentity>,
        ram: Option<Ram>,
        peer: Arc<Peer>,
    ) -> Self {
        let (hooks, gone) = (Hooks::default(), AtomicBool::new(false));
        let ram = Mutex::new(ram.map(Arc::new));
        Self { id, identity, ram, peer, hooks, gone }
    }

    /// The broker's number for it.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// What it is registered as.
    pub(crate) fn identity(&self) -> &VmIdentity {
        &self.identity
    }

    /// Its RAM, where others may look at it; `None` once it has ended.
    pub(crate) fn ram(&self) -> Option<Arc<Ram>> {
        lock(&self.ram).clone()
    }

    /// Closes its RAM, which may take long, unless another thread uses it at this moment.
    pub(crate) fn close_ram(&self) {
        let ram = lock(&self.ram).take();
        drop(ram);
    }

    /// Its VMM.
    pub(crate) fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// Its hooks.
    pub(crate) fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    /// Whether its VMM has gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Marks the VM as gone: from now on nothing new is given out for it.
    pub(crate) fn mark_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// How a list shows it.
    pub(crate) fn info(&self) -> TargetInfo {
        TargetInfo {
            id: self.id,
            identity: self.identity().clone(),
            memory_bytes: self.ram().map_or(0, |ram| ram.layout().map.memory_bytes()),
            pid: self.peer.credentials().pid,
            hooks: self.hooks.list(),
        }
    }
}

impl Ram {
    /// The RAM that comes with a registration.
    ///
    /// # Errors
    /// Where the RAM is not acceptable, or does not go with the registration; the files are then
    /// closed.
    pub(crate) fn registered(
        identity: &VmIdentity,
        regions: Vec<Region>,
        files: Vec<OwnedFd>,
    ) -> Result<Option<Self>, CallError> {
        match (identity.introspectable, files.is_empty()) {
            (true, false) => Self::new(files, regions).map(Some).map_err(CallError::from),
            (false, true) if regions.is_empty() => Ok(None),
            _ => Err(RegisterError::NoRam.into()),
        }
    }
}

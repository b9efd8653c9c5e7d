// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The VMs that are registered now.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Registration, TargetInfo};
use kvmmem_proto::name::{MAX_NAME, is_name};
use uuid::Uuid;

use crate::core::quota::{Bound, Exceeded, Quota};
use crate::hook::Hooks;
use crate::peer::Peer;
use crate::ram::{Ram, RamError};

/// The most VMs that are registered at a time.
pub const MAX_VMS: usize = 2048;

/// The most vCPUs.
const MAX_VCPUS: u32 = 4096;

/// Context ids below this one, and the highest, are not a VM's.
pub(crate) const FIRST_CID: u32 = 3;

/// A registered VM.
#[derive(Debug)]
pub struct Vm {
    id: u64,
    registration: Registration,
    ram: Option<Ram>,
    peer: Arc<Peer>,
    /// The user who registered or added it.
    owner: u32,
    hooks: Hooks,
    gone: AtomicBool,
}

/// Why a VM is not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The name is empty, too long or not for a terminal.
    #[error(
        "a VM's name has 1 to {MAX_NAME} bytes, all of them to be shown; give another name with --name"
    )]
    Name,
    /// The name could be taken for a UUID, by which VMs are named as well.
    #[error(
        "name {0:?} reads as a UUID, which names the VM that has it; give another name with --name"
    )]
    NameIsUuid(String),
    /// The UUID is nil.
    #[error("UUID is nil")]
    Uuid,
    /// The number of vCPUs is out of range.
    #[error("number of vCPUs is {0}, expected 1 to {MAX_VCPUS}")]
    Vcpus(u32),
    /// The context id is none that a VM may have.
    #[error("vsock context id {0} is not a VM's")]
    Cid(u32),
    /// An introspectable VM came without its RAM, or another with regions or file descriptors.
    #[error("an introspectable VM comes with the memfds of its RAM and its regions, no other does")]
    NoRam,
    /// The RAM is not acceptable.
    #[error("RAM is not acceptable")]
    Ram(#[source] RamError),
    /// Another VM has the name.
    #[error("a VM named {0:?} is registered already; give another name")]
    NameTaken(String),
    /// Another VM has the UUID.
    #[error("a VM with UUID {0} is registered already")]
    UuidTaken(Uuid),
    /// Another VM has the context id.
    #[error("a VM with vsock context id {0} is registered already")]
    CidTaken(u32),
    /// There are too many.
    #[error("registered VMs")]
    Full(#[source] Exceeded),
}

impl Vm {
    /// The broker's number for it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What its VMM said of it.
    pub fn registration(&self) -> &Registration {
        &self.registration
    }

    /// Its RAM, where others may look at it.
    pub fn ram(&self) -> Option<&Ram> {
        self.ram.as_ref()
    }

    /// Its VMM.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// Its hooks.
    pub fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    /// Whether its VMM has gone.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Marks the VM as gone: from now on nothing new is given out for it.
    pub fn mark_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// How a list shows it.
    pub fn info(&self) -> TargetInfo {
        let registration = &self.registration;
        TargetInfo {
            id: self.id,
            name: registration.name.clone(),
            uuid: registration.uuid,
            vcpus: registration.vcpus,
            start_time_ms: registration.start_time_ms,
            cid: registration.cid,
            introspectable: registration.introspectable,
            introspector: registration.introspector,
            memory_bytes: self.ram.as_ref().map_or(0, |ram| ram.layout().map.memory_bytes()),
            pid: self.peer.credentials().pid,
            hooks: self.hooks.list(),
        }
    }
}

impl Ram {
    /// The RAM that comes with a registration, whose regions it takes.
    ///
    /// # Errors
    /// [`RegisterError::NoRam`], [`RegisterError::Ram`]; the files are then closed.
    pub fn registered(
        registration: &mut Registration,
        files: Vec<OwnedFd>,
    ) -> Result<Option<Self>, RegisterError> {
        let regions = std::mem::take(&mut registration.regions);
        match (registration.introspectable, files.is_empty()) {
            (true, false) => Self::new(files, regions).map(Some).map_err(RegisterError::Ram),
            (false, true) if regions.is_empty() => Ok(None),
            _ => Err(RegisterError::NoRam),
        }
    }
}

/// The registered VMs, by number. Numbers are never used again.
#[derive(Debug)]
pub struct Registry {
    vms: BTreeMap<u64, Arc<Vm>>,
    quota: Quota,
    last_id: u64,
}

impl Registry {
    /// A registry of so many VMs.
    pub fn new(bound: Bound) -> Self {
        Self { vms: BTreeMap::new(), quota: Quota::new(bound), last_id: 0 }
    }

    /// Registers a VM for a user. Takes `ram` only then: what is not taken is freed by the caller,
    /// without a lock on the registry.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn insert(
        &mut self,
        registration: Registration,
        ram: &mut Option<Ram>,
        peer: Arc<Peer>,
        by: Credentials,
    ) -> Result<Arc<Vm>, RegisterError> {
        check(&registration)?;
        for vm in self.vms.values() {
            let other = vm.registration();
            if other.name == registration.name {
                return Err(RegisterError::NameTaken(registration.name));
            }
            if other.uuid == registration.uuid && !is_other_role(vm, &registration, &peer) {
                return Err(RegisterError::UuidTaken(registration.uuid));
            }
            if let Some(cid) = registration.cid.filter(|cid| other.cid == Some(*cid)) {
                return Err(RegisterError::CidTaken(cid));
            }
        }
        if registration.introspectable != ram.is_some() {
            return Err(RegisterError::NoRam);
        }
        self.quota.take(by).map_err(RegisterError::Full)?;
        self.last_id += 1;
        let vm = Arc::new(Vm {
            id: self.last_id,
            registration,
            ram: ram.take(),
            peer,
            owner: by.uid,
            hooks: Hooks::default(),
            gone: AtomicBool::new(false),
        });
        self.vms.insert(vm.id, Arc::clone(&vm));
        Ok(vm)
    }

    /// Takes a VM out. The caller drops it, without a lock on the registry: that may free its
    /// memory.
    pub fn remove(&mut self, id: u64) -> Option<Arc<Vm>> {
        let vm = self.vms.remove(&id)?;
        self.quota.give_back(vm.owner);
        Some(vm)
    }

    /// A VM by its number.
    pub fn get(&self, id: u64) -> Option<Arc<Vm>> {
        self.vms.get(&id).cloned()
    }

    /// A VM by its name or its UUID, as which no name reads. A target and an introspector may be
    /// one VM with one UUID: then the one that `is_meant`.
    pub fn find(
        &self,
        name_or_uuid: &str,
        is_meant: impl Fn(&Registration) -> bool,
    ) -> Option<Arc<Vm>> {
        let uuid = Uuid::parse_str(name_or_uuid).ok();
        let is_it = |vm: &&Arc<Vm>| match uuid {
            Some(uuid) => vm.registration.uuid == uuid,
            None => vm.registration.name == name_or_uuid,
        };
        self.vms.values().filter(is_it).max_by_key(|vm| is_meant(&vm.registration)).cloned()
    }

    /// The VM that has a vsock context id.
    pub fn with_cid(&self, cid: u32) -> Option<Arc<Vm>> {
        self.vms.values().find(|vm| vm.registration.cid == Some(cid)).cloned()
    }

    /// The VM that a connection has registered.
    pub fn of_peer(&self, peer: u64) -> Option<&Arc<Vm>> {
        self.vms.values().find(|vm| vm.peer.number() == peer)
    }

    /// All VMs whose number is above `after`, by ascending number.
    pub fn after(&self, after: u64) -> impl Iterator<Item = &Arc<Vm>> {
        self.vms.values().filter(move |vm| vm.id > after)
    }
}

/// Whether a VM and the one to be registered are one, which is looked at as the one and looks as
/// the other: under a stock QEMU each is added by itself.
fn is_other_role(vm: &Vm, registration: &Registration, peer: &Peer) -> bool {
    let other = vm.registration();
    let roles = |one: &Registration, two: &Registration| {
        (one.introspectable, one.introspector, two.introspectable, two.introspector)
            == (true, false, false, true)
    };
    let (pid, its) = (peer.credentials().pid, vm.peer.credentials().pid);
    // A process outside of this pid namespace has no number here, and may be any.
    pid == its && pid != 0 && (roles(other, registration) || roles(registration, other))
}

fn check(registration: &Registration) -> Result<(), RegisterError> {
    let name = &registration.name;
    if !is_name(name) {
        return Err(RegisterError::Name);
    }
    // In each form in which a UUID is read.
    if Uuid::parse_str(name).is_ok() {
        return Err(RegisterError::NameIsUuid(name.clone()));
    }
    if registration.uuid.is_nil() {
        return Err(RegisterError::Uuid);
    }
    if !(1..=MAX_VCPUS).contains(&registration.vcpus) {
        return Err(RegisterError::Vcpus(registration.vcpus));
    }
    match registration.cid {
        Some(cid) if cid < FIRST_CID || cid == u32::MAX => Err(RegisterError::Cid(cid)),
        _ => Ok(()),
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The VMs that are registered now.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Refusal, VmIdentity};
use kvmmem_proto::name::{MAX_NAME, is_name};
use uuid::Uuid;

use super::call_error::CallError;
use super::layout::Layout;
use super::quota::{Bound, Quota, QuotaError};

/// The most vCPUs.
const MAX_VCPUS: u32 = 4096;

/// Context ids below this one, and the highest, are not a VM's.
pub(crate) const FIRST_CID: u32 = 3;

/// How much of a name that no VM has is repeated, bytes.
const MAX_SHOWN: usize = 64;

/// A registered VM.
#[derive(Clone, Debug)]
pub(crate) struct Vm {
    pub(crate) id: u64,
    pub(crate) identity: Arc<VmIdentity>,
    /// Where its RAM is; `None` where others may not look at it.
    pub(crate) layout: Option<Arc<Layout>>,
    /// The connection of its VMM.
    pub(crate) peer: u64,
    /// The process of its VMM.
    pub(crate) vmm: Credentials,
    /// The user who registered or added it.
    owner: u32,
}

/// What a VM is registered with.
#[derive(Debug)]
pub(crate) struct NewVm {
    pub(crate) identity: Arc<VmIdentity>,
    pub(crate) layout: Option<Arc<Layout>>,
    pub(crate) peer: u64,
    pub(crate) vmm: Credentials,
    /// Who registers or adds it.
    pub(crate) by: Credentials,
}

/// Why a VM is not registered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegisterError {
    #[error(
        "a VM's name has 1 to {MAX_NAME} bytes, all of them to be shown, and does not begin with pid:, qmp: or libvirt:; give another name with --name"
    )]
    Name,
    #[error(
        "name {0:?} reads as a UUID, which names the VM that has it; give another name with --name"
    )]
    NameIsUuid(String),
    #[error("UUID is nil")]
    Uuid,
    #[error("number of vCPUs is {0}, expected 1 to {MAX_VCPUS}")]
    Vcpus(u32),
    #[error("vsock context id {0} is not a VM's")]
    Cid(u32),
    #[error("an introspectable VM comes with the memfds of its RAM and its regions, no other does")]
    NoRam,
    #[error("a VM named {0:?} is registered already; give another name")]
    NameTaken(String),
    #[error("a VM with UUID {0} is registered already")]
    UuidTaken(Uuid),
    #[error("a VM with vsock context id {0} is registered already")]
    CidTaken(u32),
    #[error("registered VMs")]
    Full(#[source] QuotaError),
}

impl RegisterError {
    /// How a peer is told.
    pub(crate) fn refusal(&self) -> Refusal {
        match self {
            Self::NameTaken(_) | Self::UuidTaken(_) | Self::CidTaken(_) => Refusal::Exists,
            Self::Full(_) => Refusal::Limit,
            Self::Name
            | Self::NameIsUuid(_)
            | Self::Uuid
            | Self::Vcpus(_)
            | Self::Cid(_)
            | Self::NoRam => Refusal::Invalid,
        }
    }
}

impl From<RegisterError> for CallError {
    fn from(error: RegisterError) -> Self {
        Self::from_error(error.refusal(), &error)
    }
}

/// The registered VMs, by number. Numbers are never used again.
#[derive(Clone, Debug)]
pub(crate) struct Vms {
    vms: BTreeMap<u64, Vm>,
    quota: Quota,
    last: u64,
}

impl Vms {
    pub(super) fn new(bound: Bound) -> Self {
        Self { vms: BTreeMap::new(), quota: Quota::new(bound), last: 0 }
    }

    /// Registers a VM; returns its number.
    pub(super) fn insert(&mut self, new: NewVm) -> Result<u64, RegisterError> {
        let NewVm { identity, layout, peer, vmm, by } = new;
        check(&identity)?;
        for vm in self.vms.values() {
            let other = &vm.identity;
            if other.name == identity.name {
                return Err(RegisterError::NameTaken(identity.name.clone()));
            }
            if other.uuid == identity.uuid && !is_other_role(vm, &identity, vmm) {
                return Err(RegisterError::UuidTaken(identity.uuid));
            }
            if let Some(cid) = identity.cid.filter(|cid| other.cid == Some(*cid)) {
                return Err(RegisterError::CidTaken(cid));
            }
        }
        if identity.introspectable != layout.is_some() {
            return Err(RegisterError::NoRam);
        }
        self.quota.take(by).map_err(RegisterError::Full)?;
        self.last += 1;
        let id = self.last;
        self.vms.insert(id, Vm { id, identity, layout, peer, vmm, owner: by.uid });
        Ok(id)
    }

    pub(super) fn remove(&mut self, id: u64) -> Option<Vm> {
        let vm = self.vms.remove(&id)?;
        self.quota.give_back(vm.owner);
        Some(vm)
    }

    pub(crate) fn get(&self, id: u64) -> Option<&Vm> {
        self.vms.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut Vm> {
        self.vms.get_mut(&id)
    }

    /// A VM by its name or its UUID, as which no name reads. A target and an introspector may be
    /// one VM with one UUID: then the one that `is_meant`.
    pub(crate) fn find(
        &self,
        name_or_uuid: &str,
        is_meant: impl Fn(&VmIdentity) -> bool,
    ) -> Result<&Vm, CallError> {
        let uuid = Uuid::parse_str(name_or_uuid).ok();
        let is_it = |vm: &&Vm| match uuid {
            Some(uuid) => vm.identity.uuid == uuid,
            None => vm.identity.name == name_or_uuid,
        };
        let found = self.vms.values().filter(is_it).max_by_key(|vm| is_meant(&vm.identity));
        found.ok_or_else(|| unknown(name_or_uuid))
    }

    /// A VM by its name or its UUID; the target, where an introspector has the same UUID.
    pub(crate) fn target(&self, name_or_uuid: &str) -> Result<&Vm, CallError> {
        self.find(name_or_uuid, |vm| vm.introspectable)
    }

    /// The VM that has a vsock context id.
    pub(crate) fn with_cid(&self, cid: u32) -> Option<&Vm> {
        self.vms.values().find(|vm| vm.identity.cid == Some(cid))
    }

    /// All VMs whose number is above `after`, by ascending number.
    pub(crate) fn after(&self, after: u64) -> impl Iterator<Item = &Vm> {
        self.vms.range(after.saturating_add(1)..).map(|(_, vm)| vm)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.vms.is_empty() && self.quota.count() == 0
    }
}

fn unknown(name: &str) -> CallError {
    let name = name.get(..name.floor_char_boundary(MAX_SHOWN)).unwrap_or_default();
    CallError::new(
        Refusal::Unknown,
        format!(
            "no VM is named {name:?}; see `kvmmem target list`, or `kvmmem host discover` for those to add"
        ),
    )
}

/// Whether a VM and the one to be registered are one, which is looked at as the one and looks as
/// the other: under a stock QEMU each is added by itself.
fn is_other_role(vm: &Vm, identity: &VmIdentity, vmm: Credentials) -> bool {
    let other = &vm.identity;
    let roles = |one: &VmIdentity, two: &VmIdentity| {
        (one.introspectable, one.introspector, two.introspectable, two.introspector)
            == (true, false, false, true)
    };
    // A process outside of this pid namespace has no number here, and may be any.
    vmm.pid == vm.vmm.pid && vmm.pid != 0 && (roles(other, identity) || roles(identity, other))
}

fn check(identity: &VmIdentity) -> Result<(), RegisterError> {
    let name = &identity.name;
    if !is_name(name) {
        return Err(RegisterError::Name);
    }
    // In each form in which a UUID is read.
    if Uuid::parse_str(name).is_ok() {
        return Err(RegisterError::NameIsUuid(name.clone()));
    }
    if identity.uuid.is_nil() {
        return Err(RegisterError::Uuid);
    }
    if !(1..=MAX_VCPUS).contains(&identity.vcpus) {
        return Err(RegisterError::Vcpus(identity.vcpus));
    }
    match identity.cid {
        Some(cid) if cid < FIRST_CID || cid == u32::MAX => Err(RegisterError::Cid(cid)),
        _ => Ok(()),
    }
}

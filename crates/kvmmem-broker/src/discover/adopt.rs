// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs that the broker has attached by itself: there is no connection whose end would be theirs, so their VMMs'
//! processes are watched.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::attach::{self, Which};
use super::process::FileId;
use super::successor;
use crate::broker::{Broker, Refused};
use crate::map::Region;
use crate::packet::PacketSocket;
use crate::peer::{Credentials, Peer};
use crate::ram::Ram;
use crate::registry::Vm;
use crate::wire::{Answer, Refusal};

impl Broker {
    /// Attaches a VM that runs under a stock VMM, and registers it.
    ///
    /// # Errors
    /// Where the peer is not root, the VM cannot be attached, or the registry does not take it.
    pub(crate) fn add_target(
        self: &Arc<Self>,
        peer: Credentials,
        which: &Which,
        name: Option<String>,
    ) -> Result<Answer, Refused> {
        may(peer)?;
        let opened =
            attach::open(which, name).map_err(|error| Refused::from_error(Refusal::Invalid, &error))?;
        let vmm = absent(opened.credentials)
            .map_err(|error| Refused::new(Refusal::Limit, format!("cannot make a socket: {error}")))?;
        let mut registration = opened.registration;
        let ram = Ram::registered(&mut registration, vec![opened.ram])
            .map_err(|error| Refused::from_registering(&error))?;
        let mut registry = self.registry();
        // The files tell, whoever has registered them: two targets with the same RAM would each have grants of it.
        if let Some(vm) = registry.after(0).find(|vm| has_same(vm, ram.as_ref())) {
            let message = format!("this VM is registered already, as {:?}", vm.registration().name);
            return Err(Refused::new(Refusal::Exists, message));
        }
        let vm = registry
            .insert(registration, ram, Arc::new(vmm))
            .map_err(|error| Refused::from_registering(&error))?;
        drop(registry);
        self.audit().added(&vm, peer);
        if let Err(error) = self.watch(vm.id(), opened.pidfd) {
            self.release(vm.id());
            return Err(Refused::new(Refusal::Limit, format!("cannot watch the VMM: {error}")));
        }
        let info = vm.info();
        let regions = vm.ram().map(|ram| ram.layout().map.regions().to_vec()).unwrap_or_default();
        Ok(Answer::Added { target: info, regions, evidence: opened.evidence })
    }

    /// Takes a VM out that was attached with [`Self::add_target`]. The VM itself runs on.
    ///
    /// # Errors
    /// Where the peer is not root, or there is no such VM.
    pub(crate) fn remove_target(&self, peer: Credentials, target: &str) -> Result<Answer, Refused> {
        may(peer)?;
        let vm = self.find(target)?;
        if !self.adopted().remove(vm.id()) {
            let message = format!("{target:?} was registered by its own VMM and goes with it");
            return Err(Refused::new(Refusal::Denied, message));
        }
        self.retire(&vm);
        Ok(Answer::Done)
    }

    /// Takes out all VMs that were attached.
    pub(crate) fn remove_adopted(&self) {
        for vm in self.adopted().vms() {
            if self.adopted().remove(vm) {
                self.release(vm);
            }
        }
    }

    /// Waits for the end of a VM's VMM.
    fn watch(self: &Arc<Self>, vm: u64, pidfd: OwnedFd) -> std::io::Result<()> {
        let broker = Arc::downgrade(self);
        let ended = move |vm| {
            if let Some(broker) = broker.upgrade() {
                broker.vmm_ended(vm);
            }
        };
        self.adopted().add(vm, pidfd, ended)
    }

    /// Does what the end of a VMM demands that is watched no more: its VM goes on with the QEMU that has taken over, or
    /// goes too.
    fn vmm_ended(self: &Arc<Self>, id: u64) {
        let registry = self.registry();
        let Some(vm) = registry.get(id) else { return };
        let others: Vec<u32> = registry.after(0).map(|vm| vm.peer().credentials().pid).collect();
        drop(registry);
        let Some(successor) = successor::find(&ram(&vm), &others) else { return self.retire(&vm) };
        let former = vm.peer().credentials();
        let credentials = Credentials { pid: successor.pid(), uid: successor.uid().unwrap_or(former.uid) };
        vm.peer().replaced(credentials);
        self.audit().taken_over(&vm, former);
        if let Err(error) = self.watch(id, successor.into_pidfd()) {
            tracing::error!(%error, vm = id, "cannot watch the VMM that has taken over");
            self.retire(&vm);
        }
    }

    fn release(&self, vm: u64) {
        let vm = self.registry().get(vm);
        if let Some(vm) = vm {
            self.retire(&vm);
        }
    }
}

/// A group's members may give out what VMMs have registered, and no more: the RAM of other VMs is root's.
fn may(peer: Credentials) -> Result<(), Refused> {
    if peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    Err(Refused::new(Refusal::Denied, "only root may add and remove targets"))
}

/// Stands for a VMM that has no connection: what is sent to it goes nowhere.
fn absent(credentials: Credentials) -> Result<Peer, Box<dyn std::error::Error>> {
    let flags = SocketFlags::CLOEXEC;
    let (socket, _) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok(Peer::new(PacketSocket::accepted(socket, Duration::from_secs(1))?, credentials))
}

fn has_same(vm: &Vm, ram: Option<&Ram>) -> bool {
    vm.ram().zip(ram).is_some_and(|(its, ram)| its.overlaps(ram).unwrap_or(false))
}

/// Which parts of which files a VM's RAM is.
fn ram(vm: &Vm) -> Vec<(FileId, Region)> {
    let Some(ram) = vm.ram() else { return Vec::new() };
    let (files, layout) = (ram.files(), ram.layout());
    let part = |region: &Region| {
        let file = files.get(usize::try_from(region.file).ok()?)?;
        Some((FileId::of(&rustix::fs::fstat(file).ok()?), *region))
    };
    layout.map.regions().iter().map(part).collect::<Option<_>>().unwrap_or_default()
}

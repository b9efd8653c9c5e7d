// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs that the broker has attached by itself: there is no connection whose end would be theirs, so their VMMs'
//! processes are watched.

use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::attach::{self, Which};
use super::process::FileId;
use crate::broker::{Broker, Refused};
use crate::packet::PacketSocket;
use crate::peer::{Credentials, Peer};
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
        let mut registry = self.registry();
        // The file tells, whoever has registered it: two targets with the same RAM would each have grants of it.
        if let Some(vm) = registry.after(0).find(|vm| id(vm) == Some(opened.id)) {
            let message = format!("this VM is registered already, as {:?}", vm.registration().name);
            return Err(Refused::new(Refusal::Exists, message));
        }
        let vm = registry
            .insert(opened.registration, Some(opened.ram), Arc::new(vmm))
            .map_err(|error| Refused::from_registering(&error))?;
        drop(registry);
        self.audit().added(&vm, peer);
        let broker = Arc::downgrade(self);
        let gone = move |vm| {
            if let Some(broker) = broker.upgrade() {
                broker.release(vm);
            }
        };
        if let Err(error) = self.adopted().add(vm.id(), opened.pidfd, gone) {
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

fn id(vm: &Vm) -> Option<FileId> {
    Some(FileId::of(&rustix::fs::fstat(vm.ram()?.fd()).ok()?))
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The VMs that the broker knows: registered, found, changed and gone.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::map::Region;
use kvmmem_proto::message::{Answer, Change, Refusal, Registration, VmIdentity};

use super::Broker;
use crate::audit::Event;
use crate::core::call_error::CallError;
use crate::core::layout::Layout;
use crate::core::vms::{NewVm, RegisterError};
use crate::hook::{Hook, Owner};
use crate::peer::Peer;
use crate::ram::Ram;
use crate::registry::Vm;

/// The most VMs in one answer to a list request; keeps it within a packet.
const PAGE: usize = 16;

impl Broker {
    /// Undoes a target's hooks to tools in a VM that is gone.
    pub(crate) fn end_hooks(&self, target: &Vm, tool: u64) {
        let is_to_tool = |hook: &Arc<Hook>| hook.owner() == Owner::Vm(tool);
        self.end_hooks_for(target, is_to_tool, "the tool's VM is gone");
    }

    /// Undoes those of a target's hooks that `is_meant` picks.
    pub(crate) fn end_hooks_for(
        &self,
        target: &Vm,
        is_meant: impl Fn(&Arc<Hook>) -> bool,
        reason: &'static str,
    ) {
        for hook in target.hooks().end(is_meant) {
            let ended = Event::HookEnded { vm: target, endpoint: hook.endpoint(), reason };
            self.audit().write(ended);
        }
    }

    /// A page of the VMs whose number is above `after`.
    pub(crate) fn list(&self, after: u64) -> Answer {
        let tables = self.tables();
        let mut vms = tables.core.vms.after(after);
        let page: Vec<Arc<Vm>> =
            vms.by_ref().take(PAGE).filter_map(|vm| tables.vms.get(&vm.id).cloned()).collect();
        let more = vms.next().is_some();
        drop(vms);
        drop(tables);
        Answer::Targets { targets: page.iter().map(|vm| vm.info()).collect(), more }
    }

    /// Registers a VM for a user, and takes `ram` if it does.
    pub(crate) fn register(
        &self,
        identity: VmIdentity,
        ram: &mut Option<Ram>,
        peer: Arc<Peer>,
        by: Credentials,
    ) -> Result<Arc<Vm>, RegisterError> {
        let identity = Arc::new(identity);
        let new = NewVm {
            identity: Arc::clone(&identity),
            layout: ram.as_ref().map(Ram::layout),
            peer: peer.number(),
            vmm: peer.credentials(),
            by,
        };
        let mut tables = self.tables();
        let id = tables.core.register(new)?;
        let vm = Arc::new(Vm::new(id, identity, ram.take(), peer));
        tables.vms.insert(id, Arc::clone(&vm));
        Ok(vm)
    }

    /// Ends a VM: its grants, views and hooks end, the peers that know it are notified, and its RAM
    /// is closed. Blocks: call it only on a thread that may wait.
    pub(crate) fn retire(&self, vm: &Vm) {
        let removed = self.decide(|tables| {
            vm.mark_gone();
            tables.core.vm_gone(vm.id());
            tables.vms.remove(&vm.id())
        });
        drop(removed);
        vm.hooks().close();
        if vm.identity().cid.is_some() {
            self.vms().iter().for_each(|target| self.end_hooks(target, vm.id()));
        }
        self.state().forget(vm.id());
        self.audit().write(Event::Gone(vm));
        vm.close_ram();
    }

    /// Records that a VM was reset, or has other RAM in its memfd. The peers that know it are told.
    ///
    /// # Errors
    /// Where the VM has no RAM to look at, or the regions are no memory map.
    pub(crate) fn ram_changed(
        &self,
        vm: Option<&Vm>,
        regions: Vec<Region>,
        change: Change,
    ) -> Result<(), CallError> {
        let ram = vm.and_then(|vm| Some((vm, vm.ram()?)));
        let (vm, ram) = ram.ok_or_else(|| {
            CallError::new(
                Refusal::Denied,
                "only the VMM of an introspectable VM may change its RAM",
            )
        })?;
        ram.change(regions).map_err(|error| CallError::from_error(Refusal::Invalid, &error))?;
        let layout = ram.layout();
        self.decide(|tables| tables.core.ram_changed(vm.id(), &layout));
        self.audit().write(Event::RamChanged { vm, change });
        self.state().changed(vm, layout.generation);
        Ok(())
    }

    /// Continues the generation that a VM's RAM had in its registration before.
    ///
    /// # Errors
    /// Where the connection has registered no introspectable VM, or the generation is not an
    /// earlier one.
    pub(crate) fn ram_continued(&self, vm: Option<&Vm>, generation: u64) -> Result<(), CallError> {
        let ram = vm.and_then(|vm| Some((vm, vm.ram()?)));
        let (vm, ram) = ram.ok_or_else(|| {
            CallError::new(
                Refusal::Denied,
                "only the VMM of an introspectable VM may say its generation",
            )
        })?;
        let first = ram.layout().generation;
        if generation >= first {
            let message = format!(
                "generation {generation} is of no earlier registration: this one began with {first}"
            );
            return Err(CallError::new(Refusal::Invalid, message));
        }
        ram.continue_from(generation);
        let layout = ram.layout();
        self.decide(|tables| tables.core.ram_changed(vm.id(), &layout));
        Ok(())
    }

    /// A VM by its number.
    pub(crate) fn vm(&self, id: u64) -> Option<Arc<Vm>> {
        self.tables().vms.get(&id).cloned()
    }

    /// All VMs, by ascending number.
    pub(crate) fn vms(&self) -> Vec<Arc<Vm>> {
        self.tables().vms.values().cloned().collect()
    }

    /// The VM that has a vsock context id.
    pub(crate) fn vm_with_cid(&self, cid: u32) -> Option<Arc<Vm>> {
        let tables = self.tables();
        tables.vms.get(&tables.core.vms.with_cid(cid)?.id).cloned()
    }

    /// A VM by its name or its UUID; the target, where an introspector has the same UUID.
    pub(crate) fn find(&self, target: &str) -> Result<Arc<Vm>, CallError> {
        self.find_as(target, |vm| vm.introspectable)
    }

    /// A VM by its name or its UUID; the introspector, where a target has the same UUID.
    pub(crate) fn find_introspector(&self, name: &str) -> Result<Arc<Vm>, CallError> {
        self.find_as(name, |vm| vm.introspector)
    }

    fn find_as(
        &self,
        name: &str,
        is_meant: impl Fn(&VmIdentity) -> bool,
    ) -> Result<Arc<Vm>, CallError> {
        let tables = self.tables();
        let id = tables.core.vms.find(name, is_meant)?.id;
        tables.vms.get(&id).cloned().ok_or_else(CallError::busy)
    }

    /// The number of a VM, by its name or its UUID.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.find(name).ok().map(|vm| vm.id())
    }

    /// Where a VM's RAM is now.
    pub fn layout(&self, vm: u64) -> Option<Arc<Layout>> {
        Some(self.vm(vm)?.ram()?.layout())
    }

    /// Registers a VM whose RAM is private to process `vmm`; returns its number. `memory` is that
    /// process's `/proc/PID/mem`, and the regions' offsets are its addresses.
    ///
    /// # Errors
    /// Where the registration or the RAM is not acceptable.
    pub fn register_private(
        &self,
        registration: Registration,
        memory: OwnedFd,
        vmm: u32,
    ) -> Result<u64, CallError> {
        let Registration { identity, regions, .. } = registration;
        let ram = Ram::of_process(memory, regions)?;
        let by = Credentials { pid: vmm, uid: rustix::process::geteuid().as_raw() };
        let peer = Arc::new(Peer::unconnected(by));
        Ok(self.register(identity, &mut Some(ram), peer, by)?.id())
    }

    /// Moves a VM's RAM to other regions of the same files.
    ///
    /// # Errors
    /// Where there is no such VM, or the regions are no memory map.
    pub fn move_ram(&self, vm: u64, regions: Vec<Region>) -> Result<(), CallError> {
        self.ram_changed(self.vm(vm).as_deref(), regions, Change::Resized)
    }

    /// Removes a VM.
    pub fn remove(&self, vm: u64) {
        if let Some(vm) = self.vm(vm) {
            self.retire(&vm);
        }
    }
}

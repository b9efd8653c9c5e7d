// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs that the broker has attached by itself: there is no connection whose end would be theirs, so
//! their VMMs' processes are watched.

use std::sync::Arc;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Answer, NewTarget, Refusal, Which};
use kvmmem_qemu::attach::{self, ExternalVm};
use kvmmem_qemu::backing::Source;
use kvmmem_qemu::listener::Socket;

use crate::audit::Event;
use crate::core::call_error::CallError;
use crate::peer::Peer;
use crate::ram::Ram;
use crate::registry::Vm;
use crate::service::Service;
use crate::state::entry::{Entry, Role};

impl Service {
    /// Attaches a VM that runs under a stock VMM, and registers it.
    ///
    /// # Errors
    /// Where the VM cannot be attached, or the registry does not take it.
    pub(crate) fn add_target(
        self: &Arc<Self>,
        peer: Credentials,
        which: &Which,
        name: Option<String>,
    ) -> Result<Answer, CallError> {
        let mut opened = attach::open(which, name, &|path| self.monitors().connect(path))
            .map_err(|error| CallError::from_error(Refusal::Invalid, &error))?;
        let (evidence, copied) = (opened.evidence, opened.copied.take());
        let vm = self.add_opened(peer, opened)?;
        let regions = vm.ram().map(|ram| ram.layout().regions()).unwrap_or_default();
        Ok(Answer::Added(NewTarget { target: vm.info(), regions, evidence, copied }))
    }

    /// Registers a VM whose RAM is open, on behalf of `peer`.
    ///
    /// # Errors
    /// Where the registry does not take it.
    pub(crate) fn add_opened(
        self: &Arc<Self>,
        peer: Credentials,
        mut opened: ExternalVm,
    ) -> Result<Arc<Vm>, CallError> {
        let monitor = opened.qmp.take().map(Socket::from);
        let vm = self.register_external(opened, monitor)?;
        self.broker().audit().write(Event::Added { vm: &vm, by: peer });
        self.broker().audit().write(Event::Registered(&vm));
        Ok(vm)
    }

    /// Registers a VM whose RAM is open, waits for the end of its VMM, and listens to its monitor
    /// where there is one.
    pub(super) fn register_external(
        self: &Arc<Self>,
        opened: ExternalVm,
        monitor: Option<Socket>,
    ) -> Result<Arc<Vm>, CallError> {
        let limit = |what: &'static str| {
            move |error: Box<dyn std::error::Error>| {
                CallError::new(Refusal::Limit, format!("{what}: {error}"))
            }
        };
        let qmp = monitor.as_ref().map(|socket| socket.path.clone());
        // Only administrators add VMs, and what is added for them counts for none of the others.
        let administrator =
            Credentials { pid: std::process::id(), uid: rustix::process::geteuid().as_raw() };
        let vmm = Peer::unconnected(opened.credentials);
        let ram = match opened.source {
            Source::Files(files) => Ram::new(files, opened.regions)?,
            Source::Process { memory, .. } => Ram::of_process(memory, opened.regions)?,
        };
        // Of a target that was removed, or that an earlier broker had.
        if let Some(generation) = self.broker().state().generation(opened.credentials.pid) {
            ram.continue_from(generation);
        }
        let mut ram = Some(ram);
        // One at a time: what is compared here stays as it is until the VM is in the registry.
        let _adding = self.adding();
        let vms: Vec<Arc<Vm>> = self.broker().vms();
        // Targets are compared by their files: two with the same RAM would each have grants of it.
        // Private RAM is that of its process.
        let is_its =
            |vm: &Vm| vm.ram().is_some() && vm.peer().credentials().pid == opened.credentials.pid;
        if let Some(vm) = vms.iter().find(|vm| has_same(vm, ram.as_ref()) || is_its(vm)) {
            let message = format!("this VM is registered already, as {:?}", vm.identity().name);
            return Err(CallError::new(Refusal::Exists, message));
        }
        drop(vms);
        let vm = self.broker().register(opened.identity, &mut ram, Arc::new(vmm), administrator)?;
        if let Err(error) = self.watch(vm.id(), opened.pidfd, monitor) {
            self.release(vm.id());
            return Err(limit("cannot watch the VMM")(error.into()));
        }
        self.broker().state().remember(&vm, Entry::of(&vm, qmp, Role::target(&vm)));
        Ok(vm)
    }

    /// Removes a VM that was added with [`Self::add_target`]. The VM itself runs on.
    pub(crate) fn remove_target(&self, target: &str) -> Result<Answer, CallError> {
        let vm = self.broker().find(target)?;
        // One that is just being added is listed before its VMM is watched.
        let adding = self.adding();
        let watched = self.external().remove(vm.id());
        drop(adding);
        if watched.is_none() {
            let message = format!("{target:?} was registered by its own VMM and goes with it");
            return Err(CallError::new(Refusal::Denied, message));
        }
        self.broker().retire(&vm);
        Ok(Answer::Done)
    }

    /// Takes out all VMs that were attached.
    pub(crate) fn remove_external(&self) {
        for vm in self.external().vms() {
            if self.external().remove(vm).is_some() {
                self.release(vm);
            }
        }
    }

    pub(super) fn release(&self, vm: u64) {
        let vm = self.broker().vm(vm);
        if let Some(vm) = vm {
            self.broker().retire(&vm);
        }
    }
}

fn has_same(vm: &Vm, ram: Option<&Ram>) -> bool {
    vm.ram().zip(ram).is_some_and(|(its, ram)| its.overlaps(ram).unwrap_or(false))
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What happens to VMs that the broker has attached by itself, and to their VMMs.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Weak};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::map::Region;
use kvmmem_proto::message::Change;
use kvmmem_qemu::attach::{self, AttachError, ExternalVm, Memory};
use kvmmem_qemu::backing::{Ram, Source};
use kvmmem_qemu::file_id::FileId;
use kvmmem_qemu::listener::{ListenerAction, Socket, VmEvent};
use kvmmem_qemu::live_update;
use kvmmem_qemu::mapping;
use kvmmem_qemu::process::Process;
use kvmmem_qemu::qmp::{Qmp, QmpError};

use super::listening::Listening;
use super::watch::WatchedVmm;
use crate::audit::Event;
use crate::core::call_error::in_words;
use crate::registry::Vm;
use crate::service::Service;
use crate::state::entry::{Entry, Role};

impl Service {
    /// Waits for the end of a VM's VMM, and listens to its monitor where there is one.
    pub(super) fn watch(
        self: &Arc<Self>,
        vm: u64,
        pidfd: OwnedFd,
        monitor: Option<Socket>,
    ) -> std::io::Result<()> {
        let silence = self.broker().limits().silence;
        let monitor = monitor.map(|Socket { path, listener, qmp }| {
            let (finder, handler) = (Arc::downgrade(self), Arc::downgrade(self));
            let handle = move |event: VmEvent<'_>| {
                handler.upgrade().map_or(ListenerAction::Stop, |it| it.handle_event(vm, event))
            };
            let monitor = self.monitors().of(&path, qmp);
            let find = move || connect(&finder, vm, &path, listener);
            let threads = (self.reactor(), self.services());
            Listening::start(threads, vm, monitor, find, handle, silence)
        });
        let service = Arc::downgrade(self);
        let ended = move |watched: Vec<WatchedVmm>| {
            if let Some(service) = service.upgrade() {
                service.vmms_ended(watched);
            }
        };
        self.external()
            .add(WatchedVmm { vm, pidfd: Arc::new(pidfd), monitor: monitor.transpose()? }, ended)
    }

    /// Does what the end of VMMs demands that are watched no more: each VM continues with the QEMU
    /// that has taken over, or goes too. However many end at a time, the processes of the host
    /// are looked through once.
    fn vmms_ended(self: &Arc<Self>, ended: Vec<WatchedVmm>) {
        let vms: Vec<(Arc<Vm>, WatchedVmm)> = ended
            .into_iter()
            .filter_map(|ended| Some((self.broker().vm(ended.vm)?, ended)))
            .collect();
        let others = self.broker().vms().iter().map(|vm| vm.peer().credentials().pid).collect();
        let rams: Vec<_> = vms.iter().map(|(vm, _)| ram(vm)).collect();
        let new_qemus = live_update::find(&rams, &others);
        for ((vm, ended), new_qemu) in vms.into_iter().zip(new_qemus) {
            match new_qemu {
                Some(new_qemu) => self.taken_over(&vm, ended, new_qemu),
                None => self.broker().retire(&vm),
            }
        }
    }

    /// Follows a VM to the process that has taken it over.
    fn taken_over(self: &Arc<Self>, vm: &Arc<Vm>, ended: WatchedVmm, new_qemu: Process) {
        let former = vm.peer().credentials();
        let credentials =
            Credentials { pid: new_qemu.pid(), uid: new_qemu.uid().unwrap_or(former.uid) };
        let socket = ended.monitor.and_then(|_| attach::command_line(&new_qemu).ok()?.qmp);
        vm.peer().replaced(credentials);
        self.broker().tables().core.vm_moved(vm.id(), credentials);
        self.broker().audit().write(Event::TakenOver { vm, former });
        let monitor = socket.clone().map(|path| Socket { path, listener: None, qmp: None });
        if let Err(error) = self.watch(ended.vm, new_qemu.into_pidfd(), monitor) {
            tracing::error!(%error, vm = ended.vm, "cannot watch the VMM that has taken over");
            return self.broker().retire(vm);
        }
        self.broker().state().remember(vm, Entry::of(vm, socket, Role::target(vm)));
    }

    /// Does what a QEMU's event demands.
    fn handle_event(self: &Arc<Self>, vm: u64, event: VmEvent<'_>) -> ListenerAction {
        let vm = self.broker().vm(vm);
        let Some((vm, ram)) = vm.as_ref().and_then(|vm| Some((vm, vm.ram()?))) else {
            return ListenerAction::Stop;
        };
        match event {
            VmEvent::Reset => {
                let regions = ram.layout().map.regions().to_vec();
                if let Err(refused) = self.broker().ram_changed(Some(vm), regions, Change::Reset) {
                    tracing::warn!(
                        vm = vm.id(),
                        reason = refused.message,
                        "a reset could not be reported"
                    );
                }
                ListenerAction::Listen
            }
            VmEvent::Memory(qmp) => self.look_again(vm, qmp),
            VmEvent::Left => {
                if let Some(watched) = self.external().remove(vm.id()) {
                    self.vmms_ended(vec![watched]);
                }
                ListenerAction::Stop
            }
        }
    }

    /// Asks a QEMU anew where its VM's RAM is.
    fn look_again(self: &Arc<Self>, vm: &Arc<Vm>, qmp: &mut Qmp) -> ListenerAction {
        let opened = match open_again(vm, qmp) {
            Ok(opened) => opened,
            Err(AttachError::Qmp(error)) if !matches!(error, QmpError::Refused { .. }) => {
                return ListenerAction::Reconnect;
            }
            Err(error) => {
                tracing::warn!(
                    vm = vm.id(),
                    error = in_words(&error),
                    "where the RAM is now is not known"
                );
                return self.give_up(vm);
            }
        };
        if is_unchanged(vm, &opened) {
            return ListenerAction::Listen;
        }
        if let Some(regions) = in_known_files(vm, &opened) {
            return match self.broker().ram_changed(Some(vm), regions, Change::Resized) {
                Ok(()) => ListenerAction::Listen,
                Err(_) => self.give_up(vm),
            };
        }
        // A view is of the files that there were: it ends, and the VM is a new
        // target.
        if self.external().remove(vm.id()).is_some() {
            let generation = vm.ram().map(|ram| ram.layout().generation);
            self.broker().retire(vm);
            // It is other memory.
            if let Some(generation) = generation {
                self.broker().state().changed(vm, generation.saturating_add(1));
            }
            match self.register_external(opened, Some(Socket::of(qmp))) {
                Ok(vm) => self.broker().audit().write(Event::Registered(&vm)),
                Err(refused) => {
                    tracing::warn!(
                        reason = refused.message,
                        "a VM with other RAM is not added again"
                    )
                }
            }
        }
        ListenerAction::Stop
    }

    /// Ends a target that is not to be relied on any more.
    fn give_up(&self, vm: &Vm) -> ListenerAction {
        if self.external().remove(vm.id()).is_some() {
            self.broker().retire(vm);
        }
        ListenerAction::Stop
    }
}

/// Opens the RAM of a VM that is registered already.
fn open_again(vm: &Vm, qmp: &mut Qmp) -> Result<ExternalVm, AttachError> {
    let credentials = vm.peer().credentials();
    let process = Process::open(credentials.pid)?;
    let line = attach::command_line(&process)?;
    let Memory { ram: Ram { regions, source }, copied, evidence } =
        attach::look(&process, &line, Some(qmp))?;
    let (identity, pidfd) = (vm.identity().clone(), process.into_pidfd());
    Ok(ExternalVm { identity, regions, source, copied, credentials, pidfd, evidence, qmp: None })
}

/// Connects to the monitor of a VM's QEMU: where it was, or where the process says that it is by
/// now.
///
/// It is the process's own where that listens. Where the socket was handed to it, the same process
/// has to listen as when the VM was added; and that may have handed others to other QEMUs, so this
/// one has to say where the VM's memory is.
fn connect(service: &Weak<Service>, vm: u64, path: &Path, listener: Option<u32>) -> Option<Qmp> {
    let vm = service.upgrade()?.broker().vm(vm)?;
    let process = Process::open(vm.peer().credentials().pid).ok()?;
    let line = attach::command_line(&process).ok()?;
    let its_own = |mut qmp: Qmp| {
        let found = qmp.listener();
        let is_its_own = found == Some(process.pid());
        let is_its = is_its_own
            || (found.is_some() && found == listener && knows_ram(&vm, &process, &mut qmp));
        is_its.then_some(qmp)
    };
    let elsewhere = line.qmp.filter(|other| other != path && other.is_absolute());
    let paths = [Some(path.to_owned()), elsewhere];
    paths.into_iter().flatten().find_map(|path| Qmp::connect(&path).ok().and_then(its_own))
}

/// Whether a QEMU says where a process has the beginning of a VM's RAM. No other QEMU has it at
/// that address.
fn knows_ram(vm: &Vm, process: &Process, qmp: &mut Qmp) -> bool {
    let mut known = || {
        let ram = vm.ram()?;
        let layout = ram.layout();
        let region = layout.map.regions().first()?;
        let hva = qmp.host_address(region.gpa).ok()?;
        if ram.is_private() {
            return (hva == region.offset).then_some(());
        }
        let file = FileId::of_file(ram.files().get(usize::try_from(region.file).ok()?)?)?;
        let mappings = process.mappings().ok()?;
        let mapping = mapping::covering(&mappings, hva, region.len)?;
        let (id, start) = mapping.shared_file()?;
        let offset = start.checked_add(hva.checked_sub(mapping.hva)?)?;
        (id == file && offset == region.offset).then_some(())
    };
    known().is_some()
}

/// Whether the RAM is where it was. That of a process can still be read only if the process runs
/// the same program.
fn is_unchanged(vm: &Vm, opened: &ExternalVm) -> bool {
    let Some(ram) = vm.ram() else { return false };
    let layout = ram.layout();
    match (&opened.source, ram.is_private()) {
        (Source::Files(_), false) => {
            in_known_files(vm, opened).is_some_and(|regions| layout.map.regions() == regions)
        }
        (Source::Process { .. }, true) => {
            let first = layout.map.regions().first();
            layout.map.regions() == opened.regions
                && first.is_some_and(|region| ram.read(region.gpa, &mut [0]).is_ok())
        }
        _ => false,
    }
}

/// Where the RAM is now, in the files that it was in already; `None` where it is in another one, or
/// private.
fn in_known_files(vm: &Vm, opened: &ExternalVm) -> Option<Vec<Region>> {
    let Source::Files(files) = &opened.source else { return None };
    let known: Vec<FileId> =
        vm.ram()?.files().iter().map(FileId::of_file).collect::<Option<_>>()?;
    let place = |region: &Region| {
        let file = FileId::of_file(files.get(usize::try_from(region.file).ok()?)?)?;
        let number = known.iter().position(|other| *other == file)?;
        Some(Region { file: u32::try_from(number).ok()?, ..*region })
    };
    opened.regions.iter().map(place).collect()
}

/// Which parts of which files a VM's RAM is.
fn ram(vm: &Vm) -> Vec<(FileId, Region)> {
    let Some(ram) = vm.ram() else { return Vec::new() };
    let (files, layout) = (ram.files(), ram.layout());
    let part = |region: &Region| {
        Some((FileId::of_file(files.get(usize::try_from(region.file).ok()?)?)?, *region))
    };
    layout.map.regions().iter().map(part).collect::<Option<_>>().unwrap_or_default()
}

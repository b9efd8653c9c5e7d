// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs a machine from its configuration: joins the plain machine, the sandbox, the introspector's
//! side and the connection to the broker.

use std::path::Path;
use std::sync::Arc;

use kvmmem_client::vmm::{Change, Vcpus, VmmLink};

use crate::config::{ResetPolicy, SerialConfig, VmConfig};
use crate::control::Control;
use crate::error::VmmError;
use crate::exit::VmExit;
use crate::introspect::broker::{regions, register};
use crate::introspect::introspection::Introspection;
use crate::introspect::mapping_limit;
use crate::introspect::pauses::Pauses;
use crate::introspect::source::TokenSource;
use crate::machine::error::MachineError;
use crate::machine::introspector::Introspector;
use crate::machine::stop::{GenerationEnd, StopHandle};
use crate::machine::{Generation, Machine, RawTerminal, check, vcpu};
use crate::sandbox::Sandbox;
use crate::signals::Signals;
use crate::status::{VmStatus, uuid_text};

/// Runs a machine until it ends.
///
/// # Errors
/// [`VmmError`]; no vCPU or device thread is left behind, and the terminal is as it was.
pub fn run(config: VmConfig, control: Control) -> Result<VmExit, VmmError> {
    check(&config)?;
    let vm = Vm::new(config, &control)?;
    let stop = control.stop_handle();
    vcpu::install_kick_handler().map_err(host("signal handling"))?;
    let _signals = match control.wants_signals() {
        true => Some(Signals::stopping(stop.clone()).map_err(host("signal handling"))?),
        false => None,
    };
    let is_stdio = vm.config.serial == SerialConfig::Stdio;
    let _terminal = is_stdio.then(RawTerminal::enter).flatten();

    let mut generation = vm.generation(&stop)?;
    control.report(&vm.started());
    let exit = loop {
        let pauses = &vm.pauses;
        match generation.run(&stop, |vcpus| pauses.set_rendezvous(vcpus.cloned()))? {
            GenerationEnd::Reset if vm.config.reset == ResetPolicy::Restart => {
                vm.reset()?;
                generation = vm.generation(&stop)?;
                control.report(&VmStatus::Restarted);
            }
            GenerationEnd::Reset => break VmExit::Reset,
            GenerationEnd::PowerOff => break VmExit::PowerOff,
            GenerationEnd::TripleFault => break VmExit::TripleFault,
            GenerationEnd::Stopped => break VmExit::Stopped,
            GenerationEnd::Failed(failure) => return Err(VmmError::of_failure(failure)),
        }
    };
    control.report(&VmStatus::Exited { reason: exit });
    Ok(exit)
}

/// What outlives resets.
struct Vm {
    config: VmConfig,
    machine: Machine,
    /// Present in an introspector.
    introspection: Option<Introspection>,
    /// Present where the machine is registered with a broker.
    link: Option<Arc<VmmLink>>,
    pauses: Arc<Pauses>,
    sandbox: Option<Sandbox>,
}

impl Vm {
    fn new(config: VmConfig, control: &Control) -> Result<Self, VmmError> {
        let machine = Machine::new(&config, control.stop_handle())?;
        let limit = mapping_limit();
        // Before any thread is started: Landlock binds those that are started later.
        let sandbox = config.sandbox.then(|| Sandbox::enter(&config));
        if sandbox.is_none() {
            tracing::warn!("no sandbox: a guest that breaks out gets all rights of this process");
        }
        let link = config.broker.as_ref().map(|path| connect(&config, path, &machine));
        let link = link.transpose()?.map(Arc::new);
        let pauses = Arc::new(Pauses::default());
        if let Some(link) = link.as_ref().filter(|_| config.introspectable) {
            let vcpus: Arc<dyn Vcpus> = pauses.clone();
            link.set_vcpus(Arc::downgrade(&vcpus));
        }
        let introspection = match config.introspector {
            false => None,
            true => {
                let link = link.clone().map(|link| -> Arc<dyn TokenSource> { link });
                let (tokens, stop) = (control.tokens().or(link), control.stop_handle());
                let Machine { kvm, ram, .. } = &machine;
                let introspection = Introspection::new(&config, kvm, ram, limit, tokens, stop);
                Some(introspection.map_err(VmmError::of_failure)?)
            }
        };
        Ok(Self { config, machine, introspection, link, pauses, sandbox })
    }

    fn started(&self) -> VmStatus {
        VmStatus::Started {
            name: self.config.name.clone(),
            uuid: uuid_text(&self.config.uuid),
            pid: std::process::id(),
            vcpus: self.config.vcpus,
            memory_bytes: self.config.memory_bytes,
            cid: self.config.cid,
            hypercalls: self.introspection.as_ref().map(Introspector::method),
            broker: self.link.is_some(),
        }
    }

    /// The machine as it is after power on.
    fn generation(&self, stop: &StopHandle) -> Result<Generation, VmmError> {
        let introspector = self.introspection.as_ref().map(|one| -> &dyn Introspector { one });
        let made = self.machine.generation(&self.config, stop, introspector);
        made.map_err(|error| match &self.sandbox {
            Some(sandbox) => sandbox.explain(error.into()),
            None => error.into(),
        })
    }

    /// Undoes all mappings, closes all views and zeroes RAM. No vCPU and no device runs.
    fn reset(&self) -> Result<(), VmmError> {
        let ram = &self.machine.ram;
        if let Some(introspection) = &self.introspection {
            introspection.reset().map_err(VmmError::Unmap)?;
        }
        ram.zero().map_err(MachineError::Ram)?;
        if let Some(link) = self.link.as_ref().filter(|_| self.config.introspectable) {
            link.ram_changed(regions(ram), Change::Reset);
        }
        Ok(())
    }
}

/// Registers the machine with the broker at `path`.
fn connect(config: &VmConfig, path: &Path, machine: &Machine) -> Result<VmmLink, VmmError> {
    let ram = &machine.ram;
    let fd = config.introspectable.then(|| ram.fd().try_clone_to_owned());
    let fd = fd.transpose().map_err(host("the broker's copy of guest RAM"))?;
    register(config, path, ram, fd)
        .map_err(|source| VmmError::Broker { path: path.to_owned(), source })
}

fn host(what: &'static str) -> impl Fn(std::io::Error) -> VmmError {
    move |source| MachineError::Host { what, source }.into()
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lifecycle of a machine: make it from its configuration, run, reset and end it.
//!
//! A *generation* is the time between two resets; vCPUs, devices and windows belong to one, RAM and
//! the connection to the broker to the machine.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use kvmmem_client::vmm::{Change, Vcpus, VmmLink};
use kvmmem_sys::ram::GuestRam;

use crate::boot;
use crate::config::{HypercallMethod, MAX_DISKS, MAX_VCPUS, ResetPolicy, SerialConfig, VmConfig};
use crate::control::{Control, GenerationEnd, StopHandle};
use crate::cpuid::CpuidTemplate;
use crate::devices::block::Block;
use crate::devices::console::{ConsoleInput, ConsoleOutput, RawTerminal};
use crate::devices::i8042::{self, I8042};
use crate::devices::power::{self, Power};
use crate::devices::serial::SerialPort;
use crate::devices::vsock::Vsock;
use crate::error::VmmError;
use crate::exit::VmExit;
use crate::hypercall::Hypercalls;
use crate::mapping::{MappingEngine, TokenSource, identity, mapping_limit, regions, register};
use crate::pauses::Pauses;
use crate::platform::{Devices, can_window, create_vm, zap_single_slots};
use crate::rendezvous::Rendezvous;
use crate::sandbox::Sandbox;
use crate::signals::Signals;
use crate::status::{ActiveMethod, VmStatus, uuid_text};
use crate::vcpu::{self, BootState, Shared, VcpuThread};
use crate::window::{Host, Views, Windows};

/// Runs a machine until it ends.
///
/// # Errors
/// [`VmmError`]; no vCPU or device thread is left behind, and the terminal is as it was.
pub fn run(config: VmConfig, control: Control) -> Result<VmExit, VmmError> {
    check(&config)?;
    let machine = Machine::new(config, &control)?;
    let stop = control.stop_handle();
    vcpu::install_kick_handler()
        .map_err(|source| VmmError::Host { what: "signal handling", source })?;
    let _signals = match control.wants_signals() {
        true => Some(
            Signals::stopping(stop.clone())
                .map_err(|source| VmmError::Host { what: "signal handling", source })?,
        ),
        false => None,
    };
    let is_stdio = machine.config.serial == SerialConfig::Stdio;
    let _terminal = is_stdio.then(RawTerminal::enter).flatten();

    let make = || {
        let made = machine.generation(&stop);
        made.map_err(|error| match &machine.sandbox {
            Some(sandbox) => sandbox.explain(error),
            None => error,
        })
    };
    let mut generation = make()?;
    control.report(&machine.started());
    let exit = loop {
        match generation.run(&stop, &machine.pauses)? {
            GenerationEnd::Reset if machine.config.reset == ResetPolicy::Restart => {
                machine.reset()?;
                generation = make()?;
                control.report(&VmStatus::Restarted);
            }
            GenerationEnd::Reset => break VmExit::Reset,
            GenerationEnd::PowerOff => break VmExit::PowerOff,
            GenerationEnd::TripleFault => break VmExit::TripleFault,
            GenerationEnd::Stopped => break VmExit::Stopped,
            GenerationEnd::Failed(error) => return Err(error),
        }
    };
    control.report(&VmStatus::Exited { reason: exit });
    Ok(exit)
}

fn check(config: &VmConfig) -> Result<(), VmmError> {
    let refused = |reason: String| Err(VmmError::Config(reason));
    if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
        return refused(format!("a machine has 1 to {MAX_VCPUS} vCPUs, not {}", config.vcpus));
    }
    if config.disks.len() > MAX_DISKS {
        return refused(format!(
            "a machine has at most {MAX_DISKS} disks, not {}",
            config.disks.len()
        ));
    }
    if config.memory_bytes < boot::MIN_RAM {
        let bytes = config.memory_bytes;
        return refused(format!(
            "{bytes:#x} bytes of RAM are too little, the least is {:#x}",
            boot::MIN_RAM
        ));
    }
    if config.cid.is_some_and(|cid| cid < 3 || cid == u32::MAX) {
        return refused("vsock CIDs 0 to 2 and the highest are reserved".into());
    }
    Ok(())
}

/// What outlives resets.
struct Machine {
    config: VmConfig,
    kvm: Kvm,
    ram: Arc<GuestRam>,
    output: ConsoleOutput,
    /// Present in an introspector.
    introspection: Option<Introspection>,
    /// Present where the machine is registered with a broker.
    link: Option<Arc<VmmLink>>,
    pauses: Arc<Pauses>,
    sandbox: Option<Sandbox>,
}

struct Introspection {
    method: ActiveMethod,
    engine: Arc<MappingEngine>,
    tokens: Option<Arc<dyn TokenSource>>,
    /// Told of what happens to the machine's grants.
    views: Arc<Views>,
    has_windows: bool,
}

impl Drop for Introspection {
    fn drop(&mut self) {
        self.views.set_windows(None);
    }
}

impl Machine {
    fn new(config: VmConfig, control: &Control) -> Result<Self, VmmError> {
        let kvm = Kvm::new().map_err(VmmError::OpenKvm)?;
        let ram = Arc::new(GuestRam::new(config.memory_bytes)?);
        let output =
            ConsoleOutput::open(&config.serial, control.stop_handle()).map_err(VmmError::Serial)?;
        let limit = mapping_limit();
        // Before any thread is started: Landlock binds those that are started later.
        let sandbox = config.sandbox.then(|| Sandbox::enter(&config));
        if sandbox.is_none() {
            tracing::warn!("no sandbox: a guest that breaks out gets all rights of this process");
        }
        let link = match &config.broker {
            None => None,
            Some(path) => {
                let fd = config
                    .introspectable
                    .then(|| ram.fd().try_clone_to_owned())
                    .transpose()
                    .map_err(|source| VmmError::Host {
                    what: "the broker's copy of guest RAM",
                    source,
                })?;
                let link = register(&config, path, &ram, fd)
                    .map_err(|source| VmmError::Broker { path: path.clone(), source })?;
                Some(Arc::new(link))
            }
        };
        let pauses = Arc::new(Pauses::default());
        if let Some(link) = link.as_ref().filter(|_| config.introspectable) {
            let vcpus: Arc<dyn Vcpus> = pauses.clone();
            link.set_vcpus(Arc::downgrade(&vcpus));
        }
        let tokens =
            control.tokens().or_else(|| link.clone().map(|link| -> Arc<dyn TokenSource> { link }));
        let introspection = match config.introspector {
            false => None,
            true => {
                let engine = MappingEngine::new(ram.clone(), limit)
                    .map_err(|source| VmmError::Host { what: "the mapping engine", source })?;
                let engine = Arc::new(engine);
                let views = Arc::new(Views::new(engine.clone(), control.stop_handle()));
                if let Some(tokens) = &tokens {
                    tokens.set_events(Arc::downgrade(&views));
                }
                let has_windows = config.window && tokens.is_some() && can_window(&kvm);
                let method = choose_method(config.hypercalls, &kvm)?;
                Some(Introspection { method, engine, tokens, views, has_windows })
            }
        };
        Ok(Self { config, kvm, ram, output, introspection, link, pauses, sandbox })
    }

    fn started(&self) -> VmStatus {
        VmStatus::Started {
            name: self.config.name.clone(),
            uuid: uuid_text(&self.config.uuid),
            pid: std::process::id(),
            vcpus: self.config.vcpus,
            memory_bytes: self.config.memory_bytes,
            cid: self.config.cid,
            hypercalls: self.introspection.as_ref().map(|introspection| introspection.method),
            broker: self.link.is_some(),
        }
    }

    /// Undoes all mappings, closes all views and zeroes RAM. No vCPU and no device runs.
    fn reset(&self) -> Result<(), VmmError> {
        if let Some(introspection) = &self.introspection {
            introspection.views.set_windows(None);
            introspection.engine.unmap_all().map_err(VmmError::Unmap)?;
        }
        self.ram.zero()?;
        if let Some(link) = self.link.as_ref().filter(|_| self.config.introspectable) {
            link.ram_changed(regions(&self.ram), Change::Reset);
        }
        Ok(())
    }

    /// The windows of a generation.
    fn windows(
        &self,
        introspection: &Introspection,
        vm: &Arc<VmFd>,
        rendezvous: &Arc<Rendezvous>,
        stop: &StopHandle,
        address_bits: u32,
    ) -> Result<Option<Arc<Windows>>, VmmError> {
        let Some(source) = introspection.tokens.clone().filter(|_| introspection.has_windows)
        else {
            return Ok(None);
        };
        zap_single_slots(vm);
        let host = Host {
            vm: vm.clone(),
            rendezvous: rendezvous.clone(),
            stop: stop.clone(),
            source,
            own_file: identity(self.ram.fd())
                .map_err(|source| VmmError::Host { what: "the machine's windows", source })?,
            ram_end: self.ram.regions().last().map_or(0, |region| region.gpa + region.len),
            address_bits,
        };
        let windows = Arc::new(Windows::new(host)?);
        introspection.views.set_windows(Some(windows.clone()));
        Ok(Some(windows))
    }

    /// A machine as it is after power on.
    fn generation(&self, stop: &StopHandle) -> Result<Generation, VmmError> {
        let config = &self.config;
        let vm = Arc::new(create_vm(&self.kvm)?);
        self.ram.attach(&vm)?;
        let method = self.introspection.as_ref().map(|introspection| introspection.method);
        if method == Some(ActiveMethod::Xen) {
            kvmmem_sys::xen::intercept_hypercalls(&vm).map_err(|source| VmmError::Host {
                what: "the forwarding of hypercalls",
                source,
            })?;
        }

        let mut devices = Devices::new(&vm);
        let serial = devices.add_serial(self.output.try_clone().map_err(VmmError::Serial)?)?;
        devices.add_ports(i8042::BASE_PORT, i8042::PORTS, I8042::new(stop.clone()));
        devices.add_ports(power::BASE_PORT, power::PORTS, Power(stop.clone()));
        let memory = Arc::new(self.ram.memory().clone());
        for disk in &config.disks {
            let block = Block::open(disk)
                .map_err(|source| VmmError::Disk { path: disk.path.clone(), source })?;
            devices.add_virtio(Box::new(block), &memory)?;
        }
        if let Some(cid) = config.cid {
            devices.add_virtio(Box::new(Vsock::open(cid, memory.clone())?), &memory)?;
        }
        let Devices { ports, mmio, acpi, .. } = devices;

        let written = |error: &dyn std::fmt::Display| VmmError::Boot(error.to_string());
        let kernel = boot::load(config, &memory)?;
        let rsdp = boot::write_tables(config.vcpus, &acpi, &memory)?;
        let seed = boot::write_seed(&memory).map_err(|error| written(&error))?;
        let params =
            boot::write_params(&kernel, rsdp, seed, &memory).map_err(|error| written(&error))?;
        boot::write_page_tables(&memory).map_err(|error| written(&error))?;
        boot::write_reset_vector(&memory).map_err(|error| written(&error))?;

        let has_windows =
            self.introspection.as_ref().is_some_and(|introspection| introspection.has_windows);
        let cpuid = CpuidTemplate::new(&self.kvm, config.vcpus, method, has_windows)?;
        let mut vcpus = Vec::with_capacity(config.vcpus.into());
        for id in 0..config.vcpus {
            let vcpu = vm
                .create_vcpu(id.into())
                .map_err(|source| VmmError::Kvm { what: "a vCPU", source })?;
            let boot = (id == 0).then_some(BootState { entry: kernel.entry, params });
            vcpu::set_up(&vcpu, id, &cpuid, boot)?;
            vcpus.push(vcpu);
        }
        let rendezvous = Arc::new(Rendezvous::new(config.vcpus));
        let hypercalls = match &self.introspection {
            None => None,
            Some(introspection) => {
                let windows =
                    self.windows(introspection, &vm, &rendezvous, stop, cpuid.address_bits())?;
                let Introspection { method, engine, tokens, .. } = introspection;
                let memory = self.ram.memory().clone();
                let hypercalls = Hypercalls::new(
                    engine.clone(),
                    tokens.clone(),
                    windows,
                    memory,
                    rendezvous.clone(),
                );
                Some((*method, hypercalls))
            }
        };
        let shared = Arc::new(Shared { ports, mmio, hypercalls, rendezvous, stop: stop.clone() });
        let input = (config.serial == SerialConfig::Stdio).then_some(serial);
        Ok(Generation { _vm: vm, vcpus, shared, input })
    }
}

fn choose_method(wanted: HypercallMethod, kvm: &Kvm) -> Result<ActiveMethod, VmmError> {
    let can_intercept = kvmmem_sys::xen::can_intercept(kvm);
    match wanted {
        HypercallMethod::Port => Ok(ActiveMethod::Port),
        HypercallMethod::Xen | HypercallMethod::Auto if can_intercept => Ok(ActiveMethod::Xen),
        HypercallMethod::Xen => Err(VmmError::NoXen),
        HypercallMethod::Auto => Ok(ActiveMethod::Port),
    }
}

/// A machine between two resets.
struct Generation {
    _vm: Arc<VmFd>,
    vcpus: Vec<VcpuFd>,
    shared: Arc<Shared>,
    /// The serial port, if it has input.
    input: Option<Arc<Mutex<SerialPort>>>,
}

impl Generation {
    /// Runs until something ends it; then all of its threads are gone, and its devices with it.
    fn run(self, stop: &StopHandle, pauses: &Pauses) -> Result<GenerationEnd, VmmError> {
        let Self { _vm, vcpus, shared, input } = self;
        let console = match input {
            Some(port) => Some(
                ConsoleInput::start(port, stop.clone())
                    .map_err(|source| VmmError::Host { what: "serial input", source })?,
            ),
            None => None,
        };
        let mut threads = Vec::with_capacity(vcpus.len());
        for (id, vcpu) in (0u8..).zip(vcpus) {
            match VcpuThread::start(id, vcpu, shared.clone()) {
                Ok(thread) => threads.push(thread),
                Err(error) => stop.end(GenerationEnd::Failed(error.into())),
            }
        }
        pauses.set_rendezvous(Some(shared.rendezvous.clone()));
        stop.wait();
        // They end once they run.
        pauses.set_rendezvous(None);
        // A thread may miss a kick between its look at `stop` and its entry into the guest: so kick
        // again.
        while threads.iter().any(|thread| !thread.is_finished()) {
            shared.rendezvous.kick();
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(console);
        Ok(stop.take())
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The plain machine: RAM, vCPUs, boot and devices. It knows nothing of targets and of the broker;
//! what an introspector adds comes by [`introspector`].
//!
//! A *generation* is the time between two resets; vCPUs, devices and windows belong to one, RAM to
//! the machine.

mod boot;
mod cpuid;
mod devices;
pub(crate) mod error;
pub(crate) mod introspector;
pub(crate) mod platform;
pub(crate) mod registers;
pub(crate) mod rendezvous;
pub(crate) mod stop;
pub(crate) mod vcpu;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use kvmmem_sys::ram::GuestRam;

pub use boot::{AcpiError, LoadError};
pub use cpuid::CpuidError;
pub(crate) use devices::console::RawTerminal;
pub(crate) use devices::vsock::DEVICE as VSOCK_DEVICE;
pub use devices::vsock::VsockError;

use crate::config::{MAX_DISKS, MAX_VCPUS, SerialConfig, VmConfig};
use crate::status::ActiveMethod;
use boot::MIN_RAM;
use cpuid::CpuidTemplate;
use devices::block::Block;
use devices::console::ConsoleOutput;
use devices::console_input::ConsoleInput;
use devices::i8042::{self, I8042};
use devices::power::{self, Power};
use devices::serial::SerialPort;
use devices::vsock::Vsock;
use error::MachineError;
use introspector::{Hardware, Introspector};
use platform::{Devices, create_vm};
use rendezvous::Rendezvous;
use stop::{GenerationEnd, StopHandle};
use vcpu::{BootState, Shared, VcpuThread};

/// Refuses a configuration that no machine has.
pub(crate) fn check(config: &VmConfig) -> Result<(), MachineError> {
    let refused = |reason: String| Err(MachineError::Config(reason));
    if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
        return refused(format!("a machine has 1 to {MAX_VCPUS} vCPUs, not {}", config.vcpus));
    }
    if config.disks.len() > MAX_DISKS {
        return refused(format!(
            "a machine has at most {MAX_DISKS} disks, not {}",
            config.disks.len()
        ));
    }
    if config.memory_bytes < MIN_RAM {
        let bytes = config.memory_bytes;
        return refused(format!(
            "{bytes:#x} bytes of RAM are too little, the least is {:#x}",
            MIN_RAM
        ));
    }
    if config.cid.is_some_and(|cid| cid < 3 || cid == u32::MAX) {
        return refused("vsock CIDs 0 to 2 and the highest are reserved".into());
    }
    Ok(())
}

/// What outlives resets.
pub(crate) struct Machine {
    pub(crate) kvm: Kvm,
    pub(crate) ram: Arc<GuestRam>,
    output: ConsoleOutput,
}

impl Machine {
    /// A machine with RAM and no vCPUs.
    pub(crate) fn new(config: &VmConfig, stop: StopHandle) -> Result<Self, MachineError> {
        let kvm = Kvm::new().map_err(MachineError::OpenKvm)?;
        let ram = Arc::new(GuestRam::new(config.memory_bytes)?);
        let output = ConsoleOutput::open(&config.serial, stop).map_err(MachineError::Serial)?;
        Ok(Self { kvm, ram, output })
    }

    /// A machine as it is after power on.
    pub(crate) fn generation(
        &self,
        config: &VmConfig,
        stop: &StopHandle,
        introspector: Option<&dyn Introspector>,
    ) -> Result<Generation, MachineError> {
        let vm = Arc::new(create_vm(&self.kvm)?);
        self.ram.attach(&vm)?;
        let method = introspector.map(Introspector::method);
        if method == Some(ActiveMethod::Xen) {
            kvmmem_sys::xen::intercept_hypercalls(&vm).map_err(|source| MachineError::Host {
                what: "the forwarding of hypercalls",
                source,
            })?;
        }

        let mut devices = Devices::new(&vm);
        let serial = devices.add_serial(self.output.try_clone().map_err(MachineError::Serial)?)?;
        devices.add_ports(i8042::BASE_PORT, i8042::PORTS, I8042::new(stop.clone()));
        devices.add_ports(power::BASE_PORT, power::PORTS, Power(stop.clone()));
        let memory = Arc::new(self.ram.memory().clone());
        for disk in &config.disks {
            let block = Block::open(disk)
                .map_err(|source| MachineError::Disk { path: disk.path.clone(), source })?;
            devices.add_virtio(Box::new(block), &memory)?;
        }
        if let Some(cid) = config.cid {
            devices.add_virtio(Box::new(Vsock::open(cid, memory.clone())?), &memory)?;
        }
        let Devices { ports, mmio, acpi, .. } = devices;

        let written = |error: &dyn std::fmt::Display| MachineError::Boot(error.to_string());
        let kernel = boot::load(config, &memory)?;
        let rsdp = boot::write_tables(config.vcpus, &acpi, &memory)?;
        let seed = boot::write_seed(&memory).map_err(|error| written(&error))?;
        let params =
            boot::write_params(&kernel, rsdp, seed, &memory).map_err(|error| written(&error))?;
        boot::write_page_tables(&memory).map_err(|error| written(&error))?;
        boot::write_reset_vector(&memory).map_err(|error| written(&error))?;

        let has_windows = introspector.is_some_and(Introspector::has_windows);
        let cpuid = CpuidTemplate::new(&self.kvm, config.vcpus, method, has_windows)?;
        let mut vcpus = Vec::with_capacity(config.vcpus.into());
        for id in 0..config.vcpus {
            let vcpu = vm
                .create_vcpu(id.into())
                .map_err(|source| MachineError::Kvm { what: "a vCPU", source })?;
            let boot = (id == 0).then_some(BootState { entry: kernel.entry, params });
            vcpu::set_up(&vcpu, id, &cpuid, boot)?;
            vcpus.push(vcpu);
        }
        let rendezvous = Arc::new(Rendezvous::new(config.vcpus));
        let exits = introspector.map(|introspector| {
            let (vm, rendezvous) = (vm.clone(), rendezvous.clone());
            let (stop, address_bits) = (stop.clone(), cpuid.address_bits());
            introspector.start(Hardware { vm, rendezvous, stop, address_bits })
        });
        let exits = exits.transpose().map_err(MachineError::Introspection)?;
        let shared =
            Arc::new(Shared { ports, mmio, introspector: exits, rendezvous, stop: stop.clone() });
        let input = (config.serial == SerialConfig::Stdio).then_some(serial);
        Ok(Generation { _vm: vm, vcpus, shared, input })
    }
}

/// A machine between two resets.
pub(crate) struct Generation {
    _vm: Arc<VmFd>,
    vcpus: Vec<VcpuFd>,
    shared: Arc<Shared>,
    /// The serial port, if it has input.
    input: Option<Arc<Mutex<SerialPort>>>,
}

impl Generation {
    /// Runs until something ends it; then all of its threads are gone, and its devices with it.
    ///
    /// Calls `on_vcpus` with the vCPUs when they run, and with `None` when they are about to end.
    pub(crate) fn run(
        self,
        stop: &StopHandle,
        on_vcpus: impl Fn(Option<&Arc<Rendezvous>>),
    ) -> Result<GenerationEnd, MachineError> {
        let Self { _vm, vcpus, shared, input } = self;
        let console = match input {
            Some(port) => Some(
                ConsoleInput::start(port, stop.clone())
                    .map_err(|source| MachineError::Host { what: "serial input", source })?,
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
        on_vcpus(Some(&shared.rendezvous));
        stop.wait();
        // They end once they run.
        on_vcpus(None);
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    /// Lines of the plain machine's sources that name what it must not know.
    fn forbidden(folder: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                forbidden(&path, found);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let names = ["crate::introspect", "kvmmem_client", "kvmmem_proto"];
            let lines = text.lines().filter(|line| names.iter().any(|name| line.contains(name)));
            found.extend(lines.map(|line| format!("{}: {line}", path.display())));
        }
    }

    #[test]
    fn it_knows_nothing_of_targets_and_of_the_broker() {
        let mut found = Vec::new();
        forbidden(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/machine"), &mut found);
        assert!(found.is_empty(), "{found:?}");
    }
}

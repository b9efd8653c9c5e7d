// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hardware other than RAM and CPUs: devices that KVM emulates, and the machine's own devices with
//! their addresses and interrupts.

use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_PIT_SPEAKER_DUMMY, KVM_X86_QUIRK_SLOT_ZAP_ALL, kvm_enable_cap,
    kvm_pit_config,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::machine::boot::AcpiDevice;
use crate::machine::devices::bus::{Bus, BusDevice};
use crate::machine::devices::console::ConsoleOutput;
use crate::machine::devices::serial::{self, SerialPort};
use crate::machine::devices::virtio::VirtioDevice;
use crate::machine::devices::virtio_mmio::{QUEUE_NOTIFY, VirtioMmio};
use crate::machine::devices::{
    SERIAL_GSI, SERIAL_PORT, VIRTIO_MMIO_BASE, VIRTIO_MMIO_GSI, VIRTIO_MMIO_LENGTH,
};
use crate::machine::error::MachineError;

/// A VM with interrupt controllers and timer, without memory and CPUs.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    /// Three pages for KVM's use on Intel CPUs, below the firmware's place at the end of 4 GiB, and
    /// one page before.
    const TSS_ADDRESS: usize = 0xfffb_d000;
    const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
    let failed = |what| move |source| MachineError::Kvm { what, source };
    let vm = kvm.create_vm().map_err(failed("a VM"))?;
    if kvm.check_extension(Cap::SetTssAddr) {
        vm.set_tss_address(TSS_ADDRESS).map_err(failed("the TSS address"))?;
    }
    if kvm.check_extension(Cap::SetIdentityMapAddr) {
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(failed("the identity map"))?;
    }
    vm.create_irq_chip().map_err(failed("the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(failed("the timer"))?;
    Ok(vm)
}

/// Whether this host's KVM can show memory that its guests cannot write: what windows are made of.
pub(crate) fn can_window(kvm: &Kvm) -> bool {
    kvm.check_extension(Cap::ReadonlyMem)
}

/// Has KVM forget the translations of a memory slot alone when the slot goes, not those of all RAM,
/// where it can (`KVM_X86_QUIRK_SLOT_ZAP_ALL` in Documentation/virt/kvm/api.rst): windows come and
/// go while the guest works.
pub(crate) fn zap_single_slots(vm: &VmFd) {
    let quirks = vm.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    if quirks & KVM_X86_QUIRK_SLOT_ZAP_ALL.cast_signed() != 0 {
        let disable = kvm_enable_cap {
            cap: KVM_CAP_DISABLE_QUIRKS2,
            args: [KVM_X86_QUIRK_SLOT_ZAP_ALL.into(), 0, 0, 0],
            ..Default::default()
        };
        // Without it windows are slower, and as good.
        if let Err(source) = vm.enable_cap(&disable) {
            tracing::debug!(%source, "KVM keeps the quirk of forgetting all translations");
        }
    }
}

/// Devices on their way to the buses and to the ACPI tables.
pub(crate) struct Devices<'a> {
    vm: &'a VmFd,
    pub(crate) ports: Bus,
    pub(crate) mmio: Bus,
    /// For the DSDT, the serial port first.
    pub(crate) acpi: Vec<AcpiDevice>,
}

impl<'a> Devices<'a> {
    /// No device yet.
    pub(crate) fn new(vm: &'a VmFd) -> Self {
        Self { vm, ports: Bus::default(), mmio: Bus::default(), acpi: Vec::new() }
    }

    /// A device behind ports, without an interrupt.
    pub(crate) fn add_ports(&mut self, base: u16, ports: u64, device: impl BusDevice + 'static) {
        self.ports.insert(base.into(), ports, Arc::new(Mutex::new(device)));
    }

    /// The first serial port.
    pub(crate) fn add_serial(
        &mut self,
        output: ConsoleOutput,
    ) -> Result<Arc<Mutex<SerialPort>>, MachineError> {
        let port = SerialPort::new(interrupt_line(self.vm, SERIAL_GSI)?, output);
        let port = Arc::new(Mutex::new(port));
        self.ports.insert(SERIAL_PORT.into(), serial::PORTS, port.clone());
        self.acpi.push(AcpiDevice::Serial);
        Ok(port)
    }

    /// A virtio device, behind the next window and interrupt.
    pub(crate) fn add_virtio(
        &mut self,
        device: Box<dyn VirtioDevice>,
        memory: &Arc<GuestMemoryMmap>,
    ) -> Result<(), MachineError> {
        // The serial port comes first and is the only one of its kind; `check` limits the others to
        // the pins.
        let index = u32::try_from(self.acpi.len().saturating_sub(1)).unwrap_or(u32::MAX);
        let base = VIRTIO_MMIO_BASE + index * VIRTIO_MMIO_LENGTH;
        let gsi = VIRTIO_MMIO_GSI + index;
        let mut kicks = Vec::new();
        for (queue, _) in (0u32..).zip(device.queue_sizes()) {
            let kick = EventFd::new(EFD_CLOEXEC)
                .map_err(|source| MachineError::Host { what: "a virtio notification", source })?;
            let address = IoEventAddress::Mmio(u64::from(base) + QUEUE_NOTIFY);
            self.vm
                .register_ioevent(&kick, &address, queue)
                .map_err(|source| MachineError::Kvm { what: "a virtio notification", source })?;
            kicks.push(kick);
        }
        let transport =
            VirtioMmio::new(device, memory.clone(), interrupt_line(self.vm, gsi)?, kicks);
        self.mmio.insert(base.into(), VIRTIO_MMIO_LENGTH.into(), Arc::new(Mutex::new(transport)));
        self.acpi.push(AcpiDevice::VirtioMmio { base, length: VIRTIO_MMIO_LENGTH, gsi });
        Ok(())
    }
}

/// An event that interrupts the guest of `vm`.
pub(crate) fn interrupt_line(vm: &VmFd, gsi: u32) -> Result<EventFd, MachineError> {
    let line = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
        .map_err(|source| MachineError::Host { what: "an interrupt line", source })?;
    vm.register_irqfd(&line, gsi)
        .map_err(|source| MachineError::Kvm { what: "an interrupt line", source })?;
    Ok(line)
}

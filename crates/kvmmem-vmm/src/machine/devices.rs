// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices of the machine, with their ports, addresses and interrupts.

pub(crate) mod block;
pub(crate) mod bus;
pub(crate) mod console;
pub(crate) mod console_input;
pub(crate) mod i8042;
pub(crate) mod power;
pub(crate) mod serial;
pub(crate) mod virtio;
pub(crate) mod virtio_mmio;
pub(crate) mod vsock;

/// First port of the first serial port.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub(crate) const SERIAL_GSI: u32 = 4;
/// Where the local APIC's registers are.
pub(crate) const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// Where the I/O APIC's registers are.
pub(crate) const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// Where the first virtio-mmio device's registers are; in the PCI hole.
pub(crate) const VIRTIO_MMIO_BASE: u32 = 0xd000_0000;
/// Length in bytes of a virtio-mmio device's registers.
pub(crate) const VIRTIO_MMIO_LENGTH: u32 = 0x1000;
/// Interrupt of the first virtio-mmio device: the first pin that never was an ISA interrupt.
pub(crate) const VIRTIO_MMIO_GSI: u32 = 16;

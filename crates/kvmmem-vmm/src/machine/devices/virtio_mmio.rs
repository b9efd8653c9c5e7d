// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2), in front of one [`VirtioDevice`].

use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use super::virtio::{
    ActivateError, Activation, F_VERSION_1, INTERRUPT_CONFIG_CHANGE, INTERRUPT_USED_BUFFER,
    Interrupt, VirtioDevice,
};
use crate::limit::warn_limited;

/// Register offsets (virtio 1.2, table 4.1).
mod register {
    pub(super) const MAGIC_VALUE: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(super) const QUEUE_NUM: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(crate) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const CONFIG: u64 = 0x100;
}
pub(crate) use register::QUEUE_NOTIFY;

/// Device status bits (virtio 1.2, 2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u32 = 1;
    pub(super) const DRIVER: u32 = 2;
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
    pub(super) const DEVICE_NEEDS_RESET: u32 = 64;
}

/// The transport's registers.
pub(crate) struct VirtioMmio {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemoryMmap>,
    interrupt: Interrupt,
    queues: Vec<Queue>,
    kicks: Vec<EventFd>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
}

impl VirtioMmio {
    /// A transport for `device`, which interrupts by `line`; `kicks` has one event per queue, which
    /// KVM writes when the guest notifies it.
    pub(crate) fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        line: EventFd,
        kicks: Vec<EventFd>,
    ) -> Self {
        let queues = new_queues(&*device);
        Self {
            device,
            memory,
            interrupt: Interrupt::new(line),
            queues,
            kicks,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            status: 0,
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// The selected queue as long as the driver may set it up.
    fn queue_to_set_up(&mut self) -> Option<&mut Queue> {
        let may = self.status & status::FEATURES_OK != 0 && self.status & status::DRIVER_OK == 0;
        let index = usize::try_from(self.queue_sel).ok()?;
        self.queues.get_mut(index).filter(|_| may)
    }

    fn read_register(&self, offset: u64) -> u32 {
        const MAGIC: u32 = u32::from_le_bytes(*b"virt");
        const VENDOR: u32 = u32::from_le_bytes(*b"KVMM");
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => 2,
            register::DEVICE_ID => self.device.id(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.offered(), self.device_features_sel),
            register::QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.max_size().into()),
            register::QUEUE_READY => self.queue().map_or(0, |queue| queue.ready().into()),
            register::INTERRUPT_STATUS => {
                let pending = self.interrupt.pending();
                // The kernel raises the line without telling us: the driver must always look at its
                // queues.
                pending | if self.device.signals_by_itself() { INTERRUPT_USED_BUFFER } else { 0 }
            }
            register::STATUS => self.status,
            // There is no shared memory region: length and base are all ones.
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES if self.status & status::FEATURES_OK == 0 => {
                set_half(&mut self.driver_features, self.driver_features_sel, value);
            }
            register::QUEUE_SEL => self.queue_sel = value,
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.write_status(value),
            // Notifications that KVM does not take: the driver used another width than 32 bits.
            register::QUEUE_NOTIFY => {
                if let Some(kick) =
                    usize::try_from(value).ok().and_then(|index| self.kicks.get(index))
                {
                    let _ = kick.write(1);
                }
            }
            _ => {
                if let Some(queue) = self.queue_to_set_up() {
                    set_up_queue(queue, offset, value);
                }
            }
        }
    }

    /// The driver's way through the status bits; bits are only added, and a write of zero resets.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let added = value & !self.status;
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.status |= added & (status::ACKNOWLEDGE | status::DRIVER);
        if added & status::FEATURES_OK != 0 {
            let refused = self.driver_features & !self.offered() != 0
                || self.driver_features & F_VERSION_1 == 0;
            if !refused {
                self.status |= status::FEATURES_OK;
            }
        }
        if added & status::DRIVER_OK != 0 && self.status & ready == ready {
            self.status |= status::DRIVER_OK;
            if let Err(error) = self.activate() {
                warn_limited!(
                    device = self.device.id(),
                    error = &error as &dyn std::error::Error,
                    "a virtio device could not start"
                );
                self.status |= status::DEVICE_NEEDS_RESET;
                self.interrupt.raise(INTERRUPT_CONFIG_CHANGE);
            }
        }
    }

    fn activate(&mut self) -> Result<(), ActivateError> {
        let memory = self.memory.clone();
        if let Some(index) = self.queues.iter().position(|queue| !is_within(queue, &memory)) {
            return Err(ActivateError::Queue { index });
        }
        let queues = std::mem::replace(&mut self.queues, new_queues(&*self.device));
        for (mine, given) in self.queues.iter_mut().zip(&queues) {
            // The registers go on saying that the queue is in use.
            mine.set_ready(given.ready());
        }
        let kicks = self.kicks.iter().map(EventFd::try_clone).collect::<io::Result<_>>()?;
        self.device.activate(Activation {
            memory,
            queues,
            kicks,
            interrupt: self.interrupt.try_clone()?,
            features: self.driver_features,
        })
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues = new_queues(&*self.device);
        self.interrupt.acknowledge(u32::MAX);
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.status = 0;
    }
}

impl Drop for VirtioMmio {
    fn drop(&mut self) {
        self.device.reset();
    }
}

impl BusDevice for VirtioMmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            let config = self.device.config().iter().copied().chain(std::iter::repeat(0));
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            for (slot, byte) in data.iter_mut().zip(config.skip(start)) {
                *slot = byte;
            }
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // No device has a configuration space that can be written.
        if offset < register::CONFIG
            && let Ok(data) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

fn new_queues(device: &dyn VirtioDevice) -> Vec<Queue> {
    // Sizes are constants of the devices, powers of two: none is refused.
    device.queue_sizes().iter().filter_map(|size| Queue::new(*size).ok()).collect()
}

/// A write to one of the registers of a queue. What the queue does not take (no power of two, not
/// aligned) it ignores; the setters without an answer would log that, without a limit.
fn set_up_queue(queue: &mut Queue, offset: u64, value: u32) {
    let mut address = match offset {
        register::QUEUE_DESC_LOW | register::QUEUE_DESC_HIGH => queue.desc_table(),
        register::QUEUE_DRIVER_LOW | register::QUEUE_DRIVER_HIGH => queue.avail_ring(),
        _ => queue.used_ring(),
    };
    set_half(&mut address, u32::from(offset & 4 != 0), value);
    let address = GuestAddress(address);
    let _ = match offset {
        register::QUEUE_NUM => queue.try_set_size(u16::try_from(value).unwrap_or(0)),
        register::QUEUE_READY => {
            queue.set_ready(value & 1 != 0);
            Ok(())
        }
        register::QUEUE_DESC_LOW | register::QUEUE_DESC_HIGH => {
            queue.try_set_desc_table_address(address)
        }
        register::QUEUE_DRIVER_LOW | register::QUEUE_DRIVER_HIGH => {
            queue.try_set_avail_ring_address(address)
        }
        register::QUEUE_DEVICE_LOW | register::QUEUE_DEVICE_HIGH => {
            queue.try_set_used_ring_address(address)
        }
        _ => Ok(()),
    };
}

/// Whether a queue is set up and its three parts lie in RAM (virtio 1.2, 2.7, for their sizes).
fn is_within(queue: &Queue, memory: &GuestMemoryMmap) -> bool {
    let size = usize::from(queue.size());
    let in_ram =
        |address, bytes| memory.check_range(GuestAddress(address), bytes, Permissions::ReadWrite);
    queue.ready()
        && in_ram(queue.desc_table(), 16 * size)
        && in_ram(queue.avail_ring(), 6 + 2 * size)
        && in_ram(queue.used_ring(), 6 + 8 * size)
}

/// The 32 bits of `features` that `select` names.
fn half(features: u64, select: u32) -> u32 {
    let [low, high] = [features & 0xffff_ffff, features >> 32];
    let half = match select {
        0 => low,
        1 => high,
        _ => 0,
    };
    u32::try_from(half).unwrap_or(0)
}

/// Sets the low (0) or high (1) 32 bits of `whole`.
fn set_half(whole: &mut u64, select: u32, value: u32) {
    match select {
        0 => *whole = *whole & !0xffff_ffff | u64::from(value),
        1 => *whole = *whole & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}

#[cfg(test)]
#[path = "virtio_mmio_tests.rs"]
mod tests;

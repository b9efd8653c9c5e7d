// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interface between a virtio device and its transport.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Feature bit that every device of this transport offers and every driver must take.
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// A device behind the transport.
pub(crate) trait VirtioDevice: Send {
    /// Device id (virtio 1.2, chapter 5).
    fn id(&self) -> u32;
    /// Features on offer, without [`F_VERSION_1`].
    fn features(&self) -> u64;
    /// Size of each queue, a power of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// The device's configuration space; bytes after it read as zero.
    fn config(&self) -> &[u8];
    /// Whether interrupts come without [`Interrupt`], from the kernel.
    fn signals_by_itself(&self) -> bool {
        false
    }
    /// Starts serving the queues: the driver is ready.
    ///
    /// # Errors
    /// The guest sees a device that needs a reset.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Stops serving and forgets the driver; a reset of an idle device does nothing.
    fn reset(&mut self);
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ActivateError {
    #[error("queue {index} is not set up, or not within RAM")]
    Queue { index: usize },
    #[error("cannot set the device up")]
    Io(#[from] io::Error),
    #[error("vhost refused {step}")]
    Vhost { step: &'static str, source: vhost::Error },
}

/// What a device gets when its driver is ready.
pub(crate) struct Activation {
    pub(crate) memory: Arc<GuestMemoryMmap>,
    /// Valid, all within RAM.
    pub(crate) queues: Vec<Queue>,
    /// For each queue, what the driver's notifications write.
    pub(crate) kicks: Vec<EventFd>,
    pub(crate) interrupt: Interrupt,
    /// What the driver took of the features on offer.
    pub(crate) features: u64,
}

/// The device's interrupt.
pub(crate) struct Interrupt {
    status: Arc<AtomicU32>,
    line: EventFd,
}

/// `InterruptStatus` bits (virtio 1.2, 4.2.2).
pub(crate) const INTERRUPT_USED_BUFFER: u32 = 1;
pub(crate) const INTERRUPT_CONFIG_CHANGE: u32 = 2;

impl Interrupt {
    /// An interrupt that raises `line`.
    pub(crate) fn new(line: EventFd) -> Self {
        Self { status: Arc::default(), line }
    }

    /// Tells the driver that the device used buffers.
    pub(crate) fn signal_used(&self) {
        self.raise(INTERRUPT_USED_BUFFER);
    }

    /// The line alone, for the kernel to raise.
    pub(crate) fn line(&self) -> &EventFd {
        &self.line
    }

    /// Raises the line for `cause`, which stays pending until the driver acknowledges it.
    pub(crate) fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        // Fails only when the counter is full: then the interrupt is pending anyway.
        let _ = self.line.write(1);
    }

    /// Which causes are pending.
    pub(crate) fn pending(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Takes `causes` back.
    pub(crate) fn acknowledge(&self, causes: u32) {
        self.status.fetch_and(!causes, Ordering::SeqCst);
    }

    /// The same interrupt, for the device.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { status: self.status.clone(), line: self.line.try_clone()? })
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an introspector has beyond a plain machine, as the plain machine sees it.

use std::sync::Arc;

use kvm_bindings::kvm_regs;
use kvm_ioctls::{Error, VcpuFd, VmFd};
use kvmmem_sys::pio::PortData;

use super::rendezvous::Rendezvous;
use super::stop::{Failure, StopHandle};
use crate::status::ActiveMethod;

/// What a machine that is an introspector has in all its generations.
pub(crate) trait Introspector {
    /// How hypercalls reach the VMM.
    fn method(&self) -> ActiveMethod;

    /// Whether views are shown in windows.
    fn has_windows(&self) -> bool;

    /// Starts what a generation of the machine shows of targets.
    ///
    /// # Errors
    /// The error keeps the machine from running.
    fn start(&self, hardware: Hardware) -> Result<Arc<dyn IntrospectorExits>, Failure>;
}

/// The parts of a generation that an introspector works on.
pub(crate) struct Hardware {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) rendezvous: Arc<Rendezvous>,
    pub(crate) stop: StopHandle,
    /// Number of bits of the guest's physical addresses.
    pub(crate) address_bits: u32,
}

/// What is left to do of an exit.
pub(crate) enum Served {
    /// It was another exit.
    No,
    Yes,
    /// The vCPU is to make its hypercall again: it goes back to these registers.
    Again(Box<kvm_regs>),
}

/// Serves exits of vCPUs that no device serves. Called by vCPU threads, which are not paused
/// meanwhile: a vCPU's number is for what reaches the guest's memory by KVM.
pub(crate) trait IntrospectorExits: Send + Sync {
    /// Serves a read of four bytes from the doorbell port, the last exit of `vcpu`.
    ///
    /// # Errors
    /// What KVM reports when the registers cannot be read or set.
    fn doorbell(&self, id: u8, vcpu: &mut VcpuFd, data: &PortData) -> Result<Served, Error>;

    /// Serves a hypercall that KVM forwards as Xen's, the last exit of `vcpu`.
    ///
    /// # Errors
    /// As [`IntrospectorExits::doorbell`].
    fn hypercall(&self, id: u8, vcpu: &mut VcpuFd) -> Result<Served, Error>;

    /// Counts a guest's write to read-only memory at `gpa`; false if no window is there.
    fn refuse_write(&self, gpa: u64) -> bool;
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registers of a vCPU, as KVM reports them.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// The registers of one vCPU.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Registers {
    pub(crate) general: kvm_regs,
    pub(crate) system: kvm_sregs,
    /// `None` where the CPU lacks the MSR.
    pub(crate) kernel_gs_base: Option<u64>,
    pub(crate) lstar: Option<u64>,
}

/// Reads the registers, in the vCPU's own thread: KVM holds up others while the vCPU runs.
pub(crate) fn read(vcpu: &VcpuFd) -> Result<Registers, kvm_ioctls::Error> {
    Ok(Registers {
        general: vcpu.get_regs()?,
        system: vcpu.get_sregs()?,
        kernel_gs_base: msr(vcpu, MSR_KERNEL_GS_BASE)?,
        lstar: msr(vcpu, MSR_LSTAR)?,
    })
}

/// A model-specific register; `None` where the CPU lacks it.
fn msr(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, kvm_ioctls::Error> {
    let entry = kvm_msr_entry { index, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    let count = vcpu.get_msrs(&mut msrs)?;
    Ok(msrs.as_slice().first().filter(|_| count == 1).map(|entry| entry.data))
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Makes a vCPU execute its hypercall again, after it has taken pending interrupts.

use kvm_bindings::kvm_regs;
use kvm_ioctls::{Error, VcpuFd};

/// Takes `vcpu` back to the instruction of its last exit; `regs` are its registers at that exit.
///
/// KVM completes an exit when the vCPU is next run: it sets rax and skips the instruction. With
/// `immediate_exit` it does that alone (Documentation/virt/kvm/api.rst, section 5), and the
/// registers can be set.
///
/// # Errors
/// What KVM reports.
pub(super) fn execute_again(vcpu: &mut VcpuFd, regs: &kvm_regs) -> Result<(), Error> {
    vcpu.set_kvm_immediate_exit(1);
    let completed = vcpu.run().map(|exit| format!("{exit:?}"));
    vcpu.set_kvm_immediate_exit(0);
    match completed {
        Err(error) if error.errno() == libc::EINTR => vcpu.set_regs(regs),
        Err(error) => Err(error),
        Ok(exit) => {
            tracing::error!(exit, "an exit instead of the end of a hypercall");
            Err(Error::new(libc::EIO))
        }
    }
}

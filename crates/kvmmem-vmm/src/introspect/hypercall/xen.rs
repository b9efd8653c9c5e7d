// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Method *xen*: hypercalls by `vmcall`/`vmmcall`, which KVM forwards as Xen's.

use std::task::Poll;

use kvm_ioctls::VcpuFd;

use super::again::execute_again;
use super::codec::{Registers, Width};
use super::serve::Hypercalls;

/// Serves the hypercall behind the last exit of `vcpu`; false when the exit was another one.
///
/// # Errors
/// What KVM reports when the registers cannot be read or set.
pub(super) fn on_xen_exit(
    vcpu: &mut VcpuFd,
    hypercalls: &Hypercalls,
) -> Result<bool, kvm_ioctls::Error> {
    let Some(exit) = kvmmem_sys::xen::hypercall(vcpu) else {
        return Ok(false);
    };
    let regs = vcpu.get_regs()?;
    let width = if exit.long_mode { Width::Long } else { Width::Legacy };
    let call = Registers::of_vmcall(&regs).decode(width);
    let cpl = u8::try_from(exit.cpl).unwrap_or(u8::MAX);
    match hypercalls.serve(vcpu, cpl, call) {
        Poll::Ready(result) => kvmmem_sys::xen::set_result(vcpu, result.cast_unsigned()),
        Poll::Pending => execute_again(vcpu, &regs)?,
    }
    Ok(true)
}

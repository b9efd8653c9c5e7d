// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Method *xen*: hypercalls by `vmcall`/`vmmcall`, which KVM forwards as Xen's.

use std::task::Poll;

use kvm_ioctls::VcpuFd;

use super::codec::{Registers, Width};
use super::serve::Hypercalls;
use crate::machine::introspector::Served;

/// Serves the hypercall behind the last exit of `vcpu`, number `id`.
///
/// # Errors
/// What KVM reports when the registers cannot be read or set.
pub(super) fn on_xen_exit(
    id: u8,
    vcpu: &mut VcpuFd,
    hypercalls: &Hypercalls,
) -> Result<Served, kvm_ioctls::Error> {
    let Some(exit) = kvmmem_sys::xen::hypercall(vcpu) else {
        return Ok(Served::No);
    };
    let regs = vcpu.get_regs()?;
    let width = if exit.long_mode { Width::Long } else { Width::Legacy };
    let call = Registers::of_vmcall(&regs).decode(width);
    let cpl = u8::try_from(exit.cpl).unwrap_or(u8::MAX);
    let Poll::Ready(result) = hypercalls.serve(id, vcpu, cpl, call) else {
        return Ok(Served::Again(Box::new(regs)));
    };
    kvmmem_sys::xen::set_result(vcpu, result.cast_unsigned());
    Ok(Served::Yes)
}

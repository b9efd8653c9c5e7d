// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Method *port*: hypercalls by reading the doorbell port.

use std::task::Poll;

use kvm_ioctls::VcpuFd;

use kvmmem_sys::pio::PortData;

use super::codec::{Registers, Width};
use super::serve::Hypercalls;
use crate::machine::introspector::Served;

/// Serves the hypercall behind a read of four bytes from the doorbell port, the last exit of
/// `vcpu`, number `id`.
///
/// # Errors
/// What KVM reports when the registers cannot be read or set.
pub(super) fn on_doorbell(
    id: u8,
    vcpu: &mut VcpuFd,
    data: &PortData,
    hypercalls: &Hypercalls,
) -> Result<Served, kvm_ioctls::Error> {
    let regs = vcpu.get_regs()?;
    let sregs = vcpu.get_sregs()?;
    let width = if sregs.cs.l != 0 { Width::Long } else { Width::Legacy };
    let call = Registers::of_doorbell(&regs).decode(width);
    // SS.DPL is the current privilege level, on Intel by definition and on AMD because KVM reports
    // it there.
    let Poll::Ready(result) = hypercalls.serve(id, vcpu, sregs.ss.dpl, call) else {
        return Ok(Served::Again(Box::new(regs)));
    };
    // Results lie within -1000 to 0: the low half carries all of them.
    let eax = u32::try_from(result.cast_unsigned() & 0xffff_ffff).unwrap_or(u32::MAX);
    Ok(if data.answer_dword(vcpu, eax) { Served::Yes } else { Served::No })
}

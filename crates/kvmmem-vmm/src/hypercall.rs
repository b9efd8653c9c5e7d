// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The introspector's hypercalls: decoded ([`codec`]), their token fetched ([`token`]), carried out by the mapping
//! engine. [`xen`] and [`port`] are the two ways in and out (`kvmmem_abi::hypercall`).
//!
//! | result | when |
//! |---|---|
//! | 0 | done |
//! | `-KVM_EPERM` | the caller was not at CPL 0; the broker does not let this machine map |
//! | `-KVM_EINVAL` | own GPA not the start of a page of RAM; target GPA unaligned; the target is this machine |
//! | `-KVM_EBUSY` | MAP: own page mapped already, or by another vCPU at this moment |
//! | `-KVM_ENOENT` | token unknown, used or expired; UNMAP: own page not mapped |
//! | `-KVM_EFAULT` | the token's address is not mapped to RAM; target GPA in a hole |
//! | `-KVM_ENOMEM` | as many pages mapped as `vm.max_map_count` allows |
//! | `-KVM_EAGAIN` | the broker cannot be asked now; the host's kernel refused, and the page is as it was |
//! | `-KVM_EOPNOTSUPP` | the machine has no broker |
//! | `-KVM_ENOSYS` | unknown number |
//!
//! Checks come in an order in which a token is not used up where the call cannot work: only the two that need the
//! target, its holes and its identity, come behind it.

mod codec;
mod port;
mod token;
mod xen;

use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use kvmmem_abi::errno::KvmError;
use vm_memory::GuestMemoryMmap;

pub(crate) use codec::{Hypercall, Registers, Width};
pub(crate) use port::on_doorbell;
pub(crate) use xen::on_xen_exit;

use crate::limit::warn_limited;
use crate::mapping::{MapError, MappingEngine, TokenSource};

/// What an introspector's vCPUs share to serve hypercalls.
pub(crate) struct Hypercalls {
    engine: Arc<MappingEngine>,
    tokens: Option<Arc<dyn TokenSource>>,
    memory: GuestMemoryMmap,
}

impl Hypercalls {
    pub(crate) fn new(
        engine: Arc<MappingEngine>,
        tokens: Option<Arc<dyn TokenSource>>,
        memory: GuestMemoryMmap,
    ) -> Self {
        Self { engine, tokens, memory }
    }

    /// Carries out a hypercall of `vcpu`, made at privilege level `cpl`; the result is 0 or a negative `KVM_Exxx`.
    fn serve(&self, vcpu: &VcpuFd, cpl: u8, call: Hypercall) -> i64 {
        let done = if cpl == 0 { self.dispatch(vcpu, call) } else { Err(KvmError::Perm) };
        match done {
            Ok(()) => 0,
            Err(error) => -i64::from(error.number()),
        }
    }

    fn dispatch(&self, vcpu: &VcpuFd, call: Hypercall) -> Result<(), KvmError> {
        let done = match call {
            Hypercall::MemMap { token_gva, target_gpa, own_gpa } => {
                self.engine.map(own_gpa, target_gpa, || {
                    let tokens = self.tokens.as_ref().ok_or(KvmError::OpNotSupp)?;
                    let token = token::read(token_gva, |gva| translate(vcpu, gva), &self.memory)?;
                    tokens.redeem(&token)
                })
            }
            Hypercall::MemUnmap { own_gpa } => self.engine.unmap(own_gpa),
            Hypercall::Unknown { number } => {
                warn_limited!(number = format_args!("{number:#x}"), "unknown hypercall refused");
                return Err(KvmError::NoSys);
            }
        };
        done.map_err(|error| {
            let number = error.number();
            match error {
                MapError::Host(source) => warn_limited!(
                    error = &source as &dyn std::error::Error,
                    "the host refused a hypercall's mapping"
                ),
                error => warn_limited!(%error, "hypercall refused"),
            }
            number
        })
    }
}

/// The GPA behind a guest-virtual address, as the vCPU's page tables have it.
fn translate(vcpu: &VcpuFd, gva: u64) -> Option<u64> {
    vcpu.translate_gva(gva).ok().filter(|found| found.valid != 0).map(|found| found.physical_address)
}

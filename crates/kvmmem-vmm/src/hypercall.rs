// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The introspector's hypercalls: decoded ([`codec`]), their arguments fetched ([`memory`]), carried out by the mapping
//! engine and the windows ([`view`]). [`xen`] and [`port`] are the two ways in and out (`kvmmem_abi::hypercall`).
//!
//! | result | when |
//! |---|---|
//! | 0 | done |
//! | `-KVM_EPERM` | the caller was not at CPL 0; the broker does not let this machine map; MAP: the grant is read-only; SEEK: the view has ended |
//! | `-KVM_EINVAL` | own GPA not the start of a page of RAM; target GPA unaligned; the target is this machine; unknown flags; SEEK: no view, or nothing to look for |
//! | `-KVM_EBUSY` | MAP: own page mapped already, or by another vCPU at this moment |
//! | `-KVM_ENOENT` | token unknown, used or expired; UNMAP: own page not mapped; DETACH: no view; SEEK: nothing found |
//! | `-KVM_EFAULT` | an argument's address is not mapped to RAM; MAP: target GPA in a hole or outside of the grant |
//! | `-KVM_ENOMEM` | as many pages mapped as `vm.max_map_count` allows; ATTACH: no view, range or place left |
//! | `-KVM_EAGAIN` | the broker cannot be asked now; the host's kernel refused, and all is as it was |
//! | `-KVM_EOPNOTSUPP` | the machine has no broker; ATTACH, DETACH, SEEK: it has no windows |
//! | `-KVM_ENOSYS` | unknown number |
//!
//! Checks come in an order in which a token is not used up where the call cannot work: only the two that need the
//! target, its holes and its identity, come behind it.

mod codec;
mod memory;
mod port;
mod view;
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
use crate::window::Windows;
use memory::VirtualMemory;

/// What an introspector's vCPUs share to serve hypercalls.
pub(crate) struct Hypercalls {
    engine: Arc<MappingEngine>,
    tokens: Option<Arc<dyn TokenSource>>,
    windows: Option<Arc<Windows>>,
    memory: GuestMemoryMmap,
}

impl Hypercalls {
    pub(crate) fn new(
        engine: Arc<MappingEngine>,
        tokens: Option<Arc<dyn TokenSource>>,
        windows: Option<Arc<Windows>>,
        memory: GuestMemoryMmap,
    ) -> Self {
        Self { engine, tokens, windows, memory }
    }

    /// Takes note that a guest wrote at `gpa`, where no memory takes writes; false when that is no business of windows.
    pub(crate) fn refuse_write(&self, gpa: u64) -> bool {
        self.windows.as_ref().is_some_and(|windows| windows.refuse_write(gpa))
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
        let memory = VirtualMemory { translate: |gva| translate(vcpu, gva), memory: &self.memory };
        let done = match call {
            Hypercall::MemMap { token_gva, target_gpa, own_gpa } => {
                let tokens = self.tokens.as_ref();
                self.engine.map(
                    own_gpa,
                    target_gpa,
                    || tokens.ok_or(KvmError::OpNotSupp)?.redeem(&memory.token(token_gva)?),
                    |grant| tokens.is_none_or(|tokens| tokens.is_revoked(grant)),
                )
            }
            Hypercall::MemUnmap { own_gpa } => self.engine.unmap(own_gpa),
            Hypercall::Attach { request_gva, result_gva } => {
                return view::attach(self.windows()?, &memory, request_gva, result_gva);
            }
            Hypercall::Detach { descriptor_gpa } => return view::detach(self.windows()?, descriptor_gpa),
            Hypercall::Seek { descriptor_gpa, position_gva, what } => {
                return view::seek(self.windows()?, &memory, descriptor_gpa, position_gva, what);
            }
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

    fn windows(&self) -> Result<&Windows, KvmError> {
        self.windows.as_deref().ok_or(KvmError::OpNotSupp)
    }
}

/// The GPA behind a guest-virtual address, as the vCPU's page tables have it.
fn translate(vcpu: &VcpuFd, gva: u64) -> Option<u64> {
    vcpu.translate_gva(gva).ok().filter(|found| found.valid != 0).map(|found| found.physical_address)
}

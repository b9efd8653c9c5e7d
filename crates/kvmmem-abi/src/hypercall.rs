// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The hypercalls between the introspector's kernel and its VMM.
//!
//! By `vmcall`/`vmmcall`: rax = number, rbx, rcx, rdx, rsi = a0 to a3, rdi = 0 (Xen's number 32 is `event_channel_op`,
//! and KVM answers some of its forms, chosen by rdi, in the kernel); the result comes back in rax.
//!
//! By the doorbell port: `in eax, dx` with dx = the port, rax = number, rbx, rcx, rdi, rsi = a0 to a3 (rdi stands in
//! for rdx, which the instruction needs); the result comes back in eax.
//!
//! A result is 0 or the negative of a number in [`crate::errno::KvmError`]. Only CPL 0 may call.

/// `KVM_HC_MEM_MAP`: a0 = guest-virtual address of the 32-byte token, a1 = GPA in the target, a2 = own GPA to replace.
pub const MEM_MAP: u64 = 32;

/// `KVM_HC_MEM_UNMAP`: a0 = own GPA, which becomes a fresh zero page.
pub const MEM_UNMAP: u64 = 33;

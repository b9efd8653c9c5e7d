// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The answer to a port read, given after other ioctls on the vCPU: `VcpuExit::IoIn` borrows the vCPU until then.

use kvm_bindings::{KVM_EXIT_IO, KVM_EXIT_IO_IN, kvm_run};
use kvm_ioctls::VcpuFd;

/// Where KVM puts a port's data in the mapping of `struct kvm_run`: the page behind the structure (x86).
const DATA_OFFSET: usize = 4096;

/// Answers a read of four bytes from a port with `value`; does nothing and returns false when the last exit was
/// something else.
pub fn answer_dword(vcpu: &mut VcpuFd, value: u32) -> bool {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return false;
    }
    // SAFETY: the member is plain integers, valid for any bytes; the exit reason says that KVM filled it.
    let io = unsafe { run.__bindgen_anon_1.io };
    let is_dword_read = u32::from(io.direction) == KVM_EXIT_IO_IN && io.size == 4 && io.count == 1;
    if !is_dword_read || io.data_offset != DATA_OFFSET as u64 {
        return false;
    }
    let data = std::ptr::from_mut::<kvm_run>(run).cast::<u8>().wrapping_add(DATA_OFFSET).cast::<u32>();
    // SAFETY:
    // 1. The mapping of a vCPU holds kvm_run's page and, on x86, always the page of port data behind it
    //    (KVM_GET_VCPU_MMAP_SIZE); `data` is the start of that page, so it is in bounds and aligned.
    // 2. The exclusive borrow of `vcpu` keeps others from it, and KVM reads it only in the next KVM_RUN.
    unsafe { data.write_volatile(value) };
    true
}

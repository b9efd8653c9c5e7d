// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Answers a port read after other ioctls on the vCPU, which `VcpuExit::IoIn` would borrow.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use kvm_bindings::{KVM_EXIT_IO, KVM_EXIT_IO_IN};
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Where KVM puts a port's data in the mapping of `struct kvm_run`: the page behind the structure
/// (x86).
const DATA_OFFSET: u64 = 4096;

/// Length of that page.
const DATA_BYTES: usize = 4096;

/// A vCPU's port data, mapped once more: kvm-ioctls has `struct kvm_run` alone, and a pointer made
/// from a reference to that may not leave it.
#[derive(Debug)]
pub struct PortData {
    /// The start of a mapping of [`DATA_BYTES`] that this object owns, readable and writable.
    page: NonNull<c_void>,
}

impl PortData {
    /// Maps the port data of `vcpu`.
    ///
    /// # Errors
    /// Those of mmap.
    pub fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open as long as `vcpu` is, which is borrowed for longer than
        // `fd` lives.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nothing uses.
        let page = unsafe {
            mmap(
                std::ptr::null_mut(),
                DATA_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                DATA_OFFSET,
            )
        }?;
        NonNull::new(page)
            .map(|page| Self { page })
            .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }

    /// Answers a read of four bytes from a port with `value`; does nothing and returns false when
    /// the last exit of `vcpu`, whose port data this is, was something else.
    pub fn answer_dword(&self, vcpu: &mut VcpuFd, value: u32) -> bool {
        let run = vcpu.get_kvm_run();
        if run.exit_reason != KVM_EXIT_IO {
            return false;
        }
        // SAFETY: the member is plain integers, valid for any bytes; the exit reason says that KVM
        // filled it.
        let io = unsafe { run.__bindgen_anon_1.io };
        let is_dword_read =
            u32::from(io.direction) == KVM_EXIT_IO_IN && io.size == 4 && io.count == 1;
        if !is_dword_read || io.data_offset != DATA_OFFSET {
            return false;
        }
        // SAFETY: by the invariant `page` is the start of a writable page, so that four bytes are
        // in bounds and aligned. No reference into this mapping exists, and KVM, which is
        // outside of the program, reads it in the next KVM_RUN.
        unsafe { self.page.as_ptr().cast::<u32>().write_volatile(value) };
        true
    }
}

impl Drop for PortData {
    fn drop(&mut self) {
        // SAFETY: by the invariant the range is this object's own mapping; no reference into it
        // exists, and no pointer to it leaves this object.
        let _ = unsafe { munmap(self.page.as_ptr(), DATA_BYTES) };
    }
}

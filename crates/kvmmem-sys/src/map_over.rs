// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Replaces a mapping by one of a file that may refuse.

use core::ffi::c_void;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap, mremap_fixed, munmap};

/// Maps `len` bytes of `file` from `offset` on at `address`, shared, in the place of what is there.
/// A core dump passes them by: they are another virtual machine's.
///
/// `mmap` with MAP_FIXED unmaps what is there before it asks the file. A driver or a file system
/// that refuses then leaves a hole, in which another thread's memory may come to be. So the file is
/// mapped elsewhere, and moved once nothing but want of memory can fail. `rest`, from its offset on,
/// is mapped where that leaves a hole after all.
///
/// # Safety
///
/// The range belongs to the caller, is a whole number of pages of the file, and no reference to its
/// contents exists.
///
/// # Errors
/// The system's. What was there is there still, or `rest` is.
pub(crate) unsafe fn map_over(
    address: *mut c_void,
    len: usize,
    protection: ProtFlags,
    (file, offset): (BorrowedFd<'_>, u64),
    (rest, rest_offset): (BorrowedFd<'_>, u64),
) -> Result<(), Errno> {
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    // SAFETY: with a null hint and without MAP_FIXED the kernel picks a free range, so no existing
    // mapping is touched.
    let new = unsafe { mmap(core::ptr::null_mut(), len, protection, flags, file, offset) }?;
    // SAFETY: the range was mapped just now and no other code knows it. The advice changes what a
    // core dump has, nothing else.
    let advised = unsafe { madvise(new, len, Advice::LinuxDontDump) };
    let moved = advised.and_then(|()| {
        // SAFETY: `new` is as before; by the contract the other range is the caller's, and nothing
        // relies on its contents staying the same.
        unsafe { mremap_fixed(new, len, len, MremapFlags::MAYMOVE, address) }
    });
    let Err(error) = moved else { return Ok(()) };
    // SAFETY: as before: it was not moved.
    let _ = unsafe { munmap(new, len) };
    let at_address = |flags, file, offset| {
        // SAFETY: by the contract the range is the caller's, and is replaced by what was asked for;
        // or, where it is a hole, filled, and else kept (EEXIST).
        unsafe { mmap(address, len, protection, flags, file, offset) }
    };
    // Kernels before 5.16 do not move files of huge pages. What has been mapped is not refused.
    if error == Errno::INVAL && at_address(flags | MapFlags::FIXED, file, offset).is_ok() {
        return Ok(());
    }
    let _ = at_address(flags | MapFlags::FIXED_NOREPLACE, rest, rest_offset);
    Err(error)
}

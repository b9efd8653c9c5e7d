// SPDX-License-Identifier: GPL-2.0-only
//! A process's buffer, copied to or from without page faults. C header: `include/linux/uio.h`.

use core::marker::PhantomData;

use kernel::bindings;
use kernel::iov::{IovIterDest, IovIterSource};

extern "C" {
    fn kvmmem_pagefault_disable();
    fn kvmmem_pagefault_enable();
}

/// A process's buffer and a position in it.
pub(crate) trait UserBuffer {
    /// Copies to or from `kernel` and advances the position; returns by how much.
    ///
    /// # Safety
    ///
    /// `len` bytes at `kernel` must be mapped, and no reference to them may exist.
    unsafe fn copy(&mut self, kernel: *mut u8, len: usize) -> usize;

    /// Takes the position back.
    ///
    /// # Safety
    ///
    /// It must have been advanced by at least so many bytes.
    unsafe fn revert(&mut self, len: usize);

    /// Gets the pages that the next `len` bytes need. Whether at least one byte can be copied now.
    fn fault_in(&mut self, len: usize) -> bool;
}

macro_rules! user_buffer {
    ($iter:ident, $copy:ident, $fault_in:ident) => {
        impl UserBuffer for $iter<'_> {
            unsafe fn copy(&mut self, kernel: *mut u8, len: usize) -> usize {
                // SAFETY: by the function's contract the bytes are mapped and no reference to them
                // exists; the iterator is valid.
                unsafe { bindings::$copy(kernel.cast(), len, self.as_raw()) }
            }

            unsafe fn revert(&mut self, len: usize) {
                // SAFETY: by the function's contract the position was advanced by that much.
                unsafe { $iter::revert(self, len) };
            }

            fn fault_in(&mut self, len: usize) -> bool {
                // SAFETY: the iterator is valid, and system calls, which alone have one, may sleep.
                unsafe { bindings::$fault_in(self.as_raw(), len) < len }
            }
        }
    };
}

user_buffer!(IovIterDest, _copy_to_iter, fault_in_iov_iter_writeable);
user_buffer!(IovIterSource, _copy_from_iter, fault_in_iov_iter_readable);

/// Makes accesses of this thread to user memory fail where they would need a page. A user of
/// another machine's memory is done with it in a short time then, also where the process's own
/// memory does not come.
pub(super) struct NoPageFaults(PhantomData<*const ()>);

impl NoPageFaults {
    pub(super) fn new() -> Self {
        // SAFETY: changes the current task's counter only; `drop` undoes it, in the same task, as
        // this value is not `Send`.
        unsafe { kvmmem_pagefault_disable() };
        Self(PhantomData)
    }
}

impl Drop for NoPageFaults {
    fn drop(&mut self) {
        // SAFETY: `new` raised the current task's counter by one for this value.
        unsafe { kvmmem_pagefault_enable() };
    }
}

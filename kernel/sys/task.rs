// SPDX-License-Identifier: GPL-2.0-only
//! Calling task: who it is, and whether it is being killed.

use kernel::bindings;
use kernel::prelude::*;

extern "C" {
    fn kvmmem_is_killed() -> bool;
}

/// The calling process's number in the initial namespace, its user and its name.
pub(crate) fn caller() -> (u32, u32, [u8; 16]) {
    let task = current!();
    // SAFETY: the pointer is the current task's, which is alive. Another thread may be changing the
    // name: a volatile read bears that, and the result is a hint for an audit log.
    let comm = unsafe {
        core::ptr::addr_of!((*task.as_ptr()).comm)
            .cast::<[u8; 16]>()
            .read_volatile()
    };
    // SAFETY: the initial namespace is a static of the kernel's.
    let uid =
        unsafe { bindings::from_kuid(&raw mut bindings::init_user_ns, task.uid().into_raw()) };
    (task.tgid().unsigned_abs(), uid, comm)
}

/// Whether the calling process is about to be killed.
pub(crate) fn is_killed() -> bool {
    // SAFETY: the function reads the current task's own state only.
    unsafe { kvmmem_is_killed() }
}

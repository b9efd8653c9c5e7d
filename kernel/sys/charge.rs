// SPDX-License-Identifier: GPL-2.0-only
//! Charge of pinned pages to RLIMIT_MEMLOCK.

use core::ffi::c_int;

use kernel::bindings;
use kernel::error::to_result;
use kernel::mm::{Mm, MmWithUser};
use kernel::prelude::*;
use kernel::sync::aref::ARef;

// `mm_struct` is opaque here: only a pointer passes.
#[allow(improper_ctypes)]
extern "C" {
    fn kvmmem_charge(mm: *mut bindings::mm_struct) -> c_int;
    fn kvmmem_uncharge(mm: *mut bindings::mm_struct);
}

/// One page's charge to RLIMIT_MEMLOCK, given back when dropped.
///
/// # Invariants
///
/// `mm->pinned_vm` counts one page for this value.
pub(crate) struct MemlockCharge {
    mm: ARef<Mm>,
}

impl MemlockCharge {
    /// Charges the calling process, whose memory is `mm`: `ENOMEM` beyond its limit, unless it has
    /// CAP_IPC_LOCK.
    pub(crate) fn new(mm: &MmWithUser) -> Result<Self> {
        // SAFETY: the reference keeps the `mm_struct` valid; its counter is atomic.
        to_result(unsafe { kvmmem_charge(mm.as_raw()) })?;
        // INVARIANT: just charged.
        Ok(Self {
            mm: ARef::from(&**mm),
        })
    }
}

impl Drop for MemlockCharge {
    fn drop(&mut self) {
        // SAFETY: the `ARef` keeps the `mm_struct` valid, and by the invariant there is a page to
        // give back.
        unsafe { kvmmem_uncharge(self.mm.as_raw()) };
    }
}

// SPDX-License-Identifier: GPL-2.0-only
//! Pages of user memory: pinned, and replaced by the host. C header: `include/linux/mm.h`.

use core::ffi::c_int;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;

use kernel::bindings;
use kernel::error::to_result;
use kernel::mm::virt::VmaRef;
use kernel::mm::{Mm, MmWithUser};
use kernel::prelude::*;
use kernel::sync::aref::ARef;

use super::call::Method;
use crate::abi::ioctl::{MapMemToken, PAGE_SIZE};

// The structures are opaque here: only pointers pass.
#[allow(improper_ctypes)]
extern "C" {
    fn kvmmem_charge(mm: *mut bindings::mm_struct) -> c_int;
    fn kvmmem_uncharge(mm: *mut bindings::mm_struct);
    fn kvmmem_page_gpa(page: *mut bindings::page) -> u64;
    fn kvmmem_page_is_anonymous(page: *mut bindings::page) -> bool;
}

/// Whether a page at `gva` would be in the half of the address space that processes have.
pub(crate) fn is_user_page(mm: &MmWithUser, gva: u64) -> bool {
    // SAFETY: the reference keeps the `mm_struct` valid; the size was set when its program was
    // loaded, by the process itself.
    let size = unsafe { (*mm.as_raw()).__bindgen_anon_1.task_size };
    gva.checked_add(PAGE_SIZE)
        .is_some_and(|end| end <= size as u64)
}

/// Whether the area is anonymous memory: `vma_is_anonymous()`.
pub(crate) fn is_anonymous(vma: &VmaRef) -> bool {
    // SAFETY: a `VmaRef` exists only while the area is locked at least for reading, so its
    // operations do not change.
    unsafe { (*vma.as_ptr()).vm_ops.is_null() }
}

/// One page's charge to RLIMIT_MEMLOCK, given back when dropped.
///
/// # Invariants
///
/// `mm->pinned_vm` counts one page for this value.
struct Charge(ARef<Mm>);

impl Drop for Charge {
    fn drop(&mut self) {
        // SAFETY: the `ARef` keeps the `mm_struct` valid, and by the invariant there is a page to
        // give back.
        unsafe { kvmmem_uncharge(self.0.as_raw()) };
    }
}

/// A pin of a page, which keeps its place in physical memory and is not shared with another process
/// by copy-on-write. Given back when dropped.
///
/// # Invariants
///
/// A page that `pin_user_pages_fast` returned, for long and to write, and that was not unpinned
/// since.
struct PagePin(NonNull<bindings::page>);

// SAFETY: a pin belongs to no thread; `unpin_user_pages_dirty_lock` may be called from any that may
// sleep.
unsafe impl Send for PagePin {}

impl PagePin {
    /// The page's guest-physical address.
    fn gpa(&self) -> u64 {
        // SAFETY: the page is pinned by the type's invariant, so its `struct page` is valid.
        unsafe { kvmmem_page_gpa(self.0.as_ptr()) }
    }
}

impl Drop for PagePin {
    fn drop(&mut self) {
        let mut page = self.0.as_ptr();
        // SAFETY: the page is pinned by the type's invariant, and the pin goes with this value.
        // Dirty, because the host may have changed its content behind the page tables' back. Runs
        // where sleeping is allowed: in ioctl, release and the notifier's release; the notifier's
        // free drops `ReplacedPage` only.
        unsafe { bindings::unpin_user_pages_dirty_lock(&mut page, 1, true) };
    }
}

/// A page of user memory, pinned and charged to RLIMIT_MEMLOCK.
pub(crate) struct PinnedPage {
    pin: PagePin,
    charge: Charge,
}

impl PinnedPage {
    /// Pins the page at `gva` of the calling process, whose memory is `mm`: `ENOMEM` beyond its
    /// limit, unless it has CAP_IPC_LOCK.
    pub(crate) fn pin(mm: &MmWithUser, gva: usize) -> Result<Self> {
        // SAFETY: the reference keeps the `mm_struct` valid; its counter is atomic.
        to_result(unsafe { kvmmem_charge(mm.as_raw()) })?;
        // INVARIANT: just charged.
        let charge = Charge(ARef::from(&**mm));
        let flags = bindings::FOLL_WRITE | bindings::FOLL_LONGTERM;
        let mut page = core::ptr::null_mut();
        // SAFETY: `page` has room for the one page asked for; any address may be passed.
        let count = unsafe { bindings::pin_user_pages_fast(gva, 1, flags, &mut page) };
        match (count, NonNull::new(page)) {
            // INVARIANT: just pinned.
            (1, Some(page)) => Ok(Self {
                pin: PagePin(page),
                charge,
            }),
            (0, _) => Err(EAGAIN),
            // Within the set that the ioctl may return.
            (error, _) => Err(match Error::from_errno(error) {
                error @ (EFAULT | ENOMEM) => error,
                EINVAL | EOPNOTSUPP => EINVAL,
                _ => EAGAIN,
            }),
        }
    }

    /// Whether the page is anonymous, and neither KSM's nor hugetlb's nor a device's. Pinned for
    /// writing, such a page belongs to one process only.
    pub(crate) fn is_anonymous(&self) -> bool {
        // SAFETY: the page is pinned by the type's invariant, so its `struct page` is valid.
        unsafe { kvmmem_page_is_anonymous(self.pin.0.as_ptr()) }
    }

    /// Has the host replace the page by the target's at `target_gpa`. The host's error unpins it.
    pub(crate) fn replace(
        self,
        method: Method,
        token: &MapMemToken,
        target_gpa: u64,
    ) -> Result<ReplacedPage, i64> {
        // SAFETY: the page is user memory, which the kernel only moves bytes to and from.
        // `ReplacedPage` keeps it pinned until the host has restored it.
        unsafe { method.map(token, target_gpa, self.pin.gpa()) }?;
        // INVARIANT: pinned, and replaced as of now.
        Ok(ReplacedPage {
            pin: ManuallyDrop::new(self.pin),
            charge: self.charge,
        })
    }
}

/// A pinned page that the host has replaced by another machine's. Dropping it leaks the page, but
/// not its charge: only the host's consent makes it safe to unpin.
///
/// # Invariants
///
/// The page is pinned, and the host agreed to replace it and has not agreed to undo that.
pub(crate) struct ReplacedPage {
    pin: ManuallyDrop<PagePin>,
    charge: Charge,
}

impl ReplacedPage {
    /// Has the host put the page's own memory back, as zeros. A refusal keeps the page replaced.
    pub(crate) fn restore(self, method: Method) -> Result<PinnedPage, Self> {
        // SAFETY: the page is replaced by the type's invariant.
        match unsafe { method.unmap(self.pin.gpa()) } {
            Ok(()) => Ok(PinnedPage {
                pin: ManuallyDrop::into_inner(self.pin),
                charge: self.charge,
            }),
            Err(_) => Err(self),
        }
    }
}

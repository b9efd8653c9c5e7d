// SPDX-License-Identifier: GPL-2.0-only
//! The module's only unsafe code: pinned pages and their replacement, the MMU notifier that ties a [`Process`] to an
//! `mm_struct`, RLIMIT_MEMLOCK, CPUID. The interface is safe.
//!
//! C headers: `include/linux/mm.h`, `include/linux/mmu_notifier.h`.

use core::arch::x86_64::__cpuid;
use core::ffi::{c_int, c_long, c_ulong};
use core::mem::ManuallyDrop;
use core::ops::Deref;
use core::ptr::NonNull;

use kernel::bindings;
use kernel::error::{from_err_ptr, to_result};
use kernel::mm::virt::VmaRef;
use kernel::mm::{Mm, MmWithUser};
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::types::Opaque;

use crate::abi::hypercall::{MEM_MAP, MEM_UNMAP};
use crate::hypercall::{Request, Way};
use crate::process::Process;

// The kernel's structures are opaque here: only pointers pass.
#[allow(improper_ctypes)]
extern "C" {
    fn kvmmem_vmcall(nr: c_ulong, a0: c_ulong, a1: c_ulong, a2: c_ulong) -> c_long;
    fn kvmmem_doorbell(port: u16, nr: c_ulong, a0: c_ulong, a1: c_ulong, a2: c_ulong) -> c_long;
    fn kvmmem_page_gpa(page: *mut bindings::page) -> u64;
    fn kvmmem_page_is_anonymous(page: *mut bindings::page) -> bool;
    fn kvmmem_charge(mm: *mut bindings::mm_struct) -> c_int;
    fn kvmmem_uncharge(mm: *mut bindings::mm_struct);
    fn kvmmem_notifier_get(
        ops: *const bindings::mmu_notifier_ops,
        mm: *mut bindings::mm_struct,
    ) -> *mut bindings::mmu_notifier;
}

/// eax, ebx, ecx, edx of a CPUID leaf.
pub(crate) fn cpuid(leaf: u32) -> [u32; 4] {
    // SAFETY: every x86-64 CPU has the instruction, and it changes nothing but its four registers.
    let result = unsafe { __cpuid(leaf) };
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// Overwrites `bytes` with zeros, even where nothing reads them again.
pub(crate) fn erase(bytes: &mut [u8]) {
    for byte in bytes {
        // SAFETY: the exclusive borrow is valid for a write.
        unsafe { core::ptr::write_volatile(byte, 0) };
    }
}

/// Whether the area is anonymous memory: `vma_is_anonymous()`.
pub(crate) fn is_anonymous(vma: &VmaRef) -> bool {
    // SAFETY: a `VmaRef` exists only while the area is locked at least for reading, so its operations do not change.
    unsafe { (*vma.as_ptr()).vm_ops.is_null() }
}

/// One hypercall. Returns 0 or the host's error.
///
/// # Safety
///
/// MEM_MAP and MEM_UNMAP change what is behind a physical page of this machine: the caller must hold that page
/// pinned, and it must be one whose content no kernel code relies on. MEM_MAP's first argument must be the address of
/// 32 readable bytes.
unsafe fn hypercall(way: Way, nr: u64, a0: u64, a1: u64, a2: u64) -> i64 {
    match way {
        // SAFETY: the shim follows the ABI of `crate::abi::hypercall`, which changes no memory but the page that the
        // caller vouches for. The module does not load where nobody answers, unless root forces it to.
        Way::Vmcall => unsafe { kvmmem_vmcall(nr, a0, a1, a2) },
        // SAFETY: as above; reading a port that nobody serves yields -1.
        Way::Doorbell(port) => unsafe { kvmmem_doorbell(port, nr, a0, a1, a2) },
    }
}

/// A page of user memory, pinned for long and writable, so that it keeps its place in physical memory and is not
/// shared with another process by copy-on-write. Unpinned when dropped.
///
/// # Invariants
///
/// `page` is a page that `pin_user_pages_fast` returned and that was not unpinned since.
pub(crate) struct PinnedPage {
    page: NonNull<bindings::page>,
}

// SAFETY: a pin belongs to no thread; `unpin_user_pages_dirty_lock` may be called from any that may sleep.
unsafe impl Send for PinnedPage {}

impl PinnedPage {
    /// Pins the page at `gva` of the calling process.
    pub(crate) fn pin(gva: usize) -> Result<Self> {
        let flags = bindings::FOLL_WRITE | bindings::FOLL_LONGTERM;
        let mut page = core::ptr::null_mut();
        // SAFETY: `page` has room for the one page asked for; any address may be passed.
        let count = unsafe { bindings::pin_user_pages_fast(gva, 1, flags, &mut page) };
        match (count, NonNull::new(page)) {
            // INVARIANT: just pinned.
            (1, Some(page)) => Ok(Self { page }),
            (0, _) => Err(EAGAIN),
            (error, _) => Err(pin_error(Error::from_errno(error))),
        }
    }

    /// Whether the page is anonymous, and neither KSM's nor hugetlb's nor a device's. Pinned for writing, such a page
    /// belongs to one process only.
    pub(crate) fn is_anonymous(&self) -> bool {
        // SAFETY: the page is pinned by the type's invariant, so its `struct page` is valid.
        unsafe { kvmmem_page_is_anonymous(self.page.as_ptr()) }
    }

    /// Has the host replace the page by the target's that `request` names. The host's error unpins the page.
    pub(crate) fn replace(self, request: &Request, way: Way) -> Result<ReplacedPage, i64> {
        let (target_gpa, _) = request.addresses();
        let token = request.bytes().as_ptr() as u64;
        // SAFETY: the page is pinned by the type's invariant; it is user memory, which the kernel only moves bytes
        // to and from; `request` keeps the token's 32 bytes in place during the call.
        match unsafe { hypercall(way, MEM_MAP, token, target_gpa, self.gpa()) } {
            // INVARIANT: pinned, and replaced as of now.
            0 => Ok(ReplacedPage { pinned: ManuallyDrop::new(self) }),
            error => Err(error),
        }
    }

    /// The page's guest-physical address.
    fn gpa(&self) -> u64 {
        // SAFETY: the page is pinned by the type's invariant, so its `struct page` is valid.
        unsafe { kvmmem_page_gpa(self.page.as_ptr()) }
    }
}

impl Drop for PinnedPage {
    fn drop(&mut self) {
        let mut page = self.page.as_ptr();
        // SAFETY: the page is pinned by the type's invariant, and the pin goes with this value. Dirty, because the
        // host may have changed its content behind the page tables' back. Runs where sleeping is allowed: in ioctl,
        // release and the notifier's release; the notifier's free drops `ReplacedPage` only.
        unsafe { bindings::unpin_user_pages_dirty_lock(&mut page, 1, true) };
    }
}

/// A pinned page behind which the host has put another machine's memory. Dropping it leaks the page: only the host's
/// consent makes it safe to unpin.
///
/// # Invariants
///
/// The page is pinned, and the host agreed to replace it and has not agreed to undo that.
pub(crate) struct ReplacedPage {
    pinned: ManuallyDrop<PinnedPage>,
}

impl ReplacedPage {
    /// Has the host put the page's own memory back, as zeros. A refusal keeps the page replaced.
    pub(crate) fn restore(self, way: Way) -> Result<PinnedPage, Self> {
        // SAFETY: the page is pinned and replaced by the type's invariants.
        match unsafe { hypercall(way, MEM_UNMAP, self.pinned.gpa(), 0, 0) } {
            0 => Ok(ManuallyDrop::into_inner(self.pinned)),
            _ => Err(self),
        }
    }
}

/// The errors of pinning, within the set that the ioctl may return.
fn pin_error(error: Error) -> Error {
    match error {
        EFAULT | ENOMEM => error,
        EINVAL | EOPNOTSUPP => EINVAL,
        _ => EAGAIN,
    }
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
    /// Charges the calling process, whose memory is `mm`: `ENOMEM` beyond its limit, unless it has CAP_IPC_LOCK.
    pub(crate) fn new(mm: &MmWithUser) -> Result<Self> {
        // SAFETY: the reference keeps the `mm_struct` valid; its counter is atomic.
        to_result(unsafe { kvmmem_charge(mm.as_raw()) })?;
        // INVARIANT: just charged.
        Ok(Self { mm: ARef::from(&**mm) })
    }
}

impl Drop for MemlockCharge {
    fn drop(&mut self) {
        // SAFETY: the `ARef` keeps the `mm_struct` valid, and by the invariant there is a page to give back.
        unsafe { kvmmem_uncharge(self.mm.as_raw()) };
    }
}

/// A [`Process`] as the MMU notifiers know it. They allocate one per `mm_struct`, count its users, and free it after
/// the last `mmu_notifier_put` and a grace period.
#[repr(C)]
#[pin_data]
struct Node {
    // First, so that a pointer to the notifier is a pointer to the node.
    notifier: Opaque<bindings::mmu_notifier>,
    #[pin]
    process: Process,
}

// Its address is what tells this module's notifiers from others'.
static NOTIFIER_OPS: bindings::mmu_notifier_ops = bindings::mmu_notifier_ops {
    release: Some(notifier_release),
    alloc_notifier: Some(notifier_alloc),
    free_notifier: Some(notifier_free),
    ..pin_init::zeroed()
};

extern "C" fn notifier_alloc(_mm: *mut bindings::mm_struct) -> *mut bindings::mmu_notifier {
    let node = KBox::pin_init(
        try_pin_init!(Node { notifier: Opaque::zeroed(), process <- Process::new() }? Error),
        GFP_KERNEL_ACCOUNT,
    );
    match node {
        // SAFETY: nobody moves the node from here on: only the notifiers know it, and `notifier_free` frees it.
        Ok(node) => KBox::into_raw(unsafe { Pin::into_inner_unchecked(node) }).cast(),
        Err(error) => error.to_ptr(),
    }
}

/// # Safety
///
/// `notifier` came from [`notifier_alloc`] and is not freed during the call.
unsafe extern "C" fn notifier_release(notifier: *mut bindings::mmu_notifier, _mm: *mut bindings::mm_struct) {
    // SAFETY: by the function's contract `notifier` is the first field of a live `Node`, of which only shared
    // references exist.
    let node = unsafe { &*notifier.cast::<Node>() };
    node.process.exited();
}

/// # Safety
///
/// `notifier` came from [`notifier_alloc`] and nobody uses it any more.
unsafe extern "C" fn notifier_free(notifier: *mut bindings::mmu_notifier) {
    // SAFETY: by the function's contract this is the pointer of `KBox::into_raw`, and ours alone. It stays pinned
    // until it is dropped in place.
    drop(unsafe { Pin::new_unchecked(KBox::from_raw(notifier.cast::<Node>())) });
}

/// A counted reference to the [`Process`] of an `mm_struct`.
///
/// # Invariants
///
/// `node` is what `mmu_notifier_get` returned for [`NOTIFIER_OPS`], and this value owns one of its counts.
pub(crate) struct ProcessRef {
    node: NonNull<Node>,
}

// SAFETY: `Process` may be shared between threads, and `mmu_notifier_put` may be called from any.
unsafe impl Send for ProcessRef {}
// SAFETY: a shared `ProcessRef` only gives shared access to a `Process`.
unsafe impl Sync for ProcessRef {}

impl ProcessRef {
    /// The calling process's; its first open file creates it. `EINVAL` for a kernel thread.
    pub(crate) fn of_current() -> Result<Self> {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        // SAFETY: `mm` is the caller's, so it has users during the call; the operations are of this module, which the
        // file being opened keeps loaded, and no lock of the `mm_struct` is held.
        let notifier = from_err_ptr(unsafe { kvmmem_notifier_get(&NOTIFIER_OPS, mm.as_raw()) })?;
        // INVARIANT: `mmu_notifier_get` counted us; `notifier_alloc` returned the node, which is not null.
        Ok(Self { node: NonNull::new(notifier.cast()).ok_or(ENOMEM)? })
    }

    /// Whether `mm` is the process's memory. While the reference lasts no other `mm_struct` can have its address.
    pub(crate) fn is(&self, mm: &Mm) -> bool {
        // SAFETY: by the invariant the node is alive; its `mm` was written before `mmu_notifier_get` returned and does
        // not change.
        let owner = unsafe { (*self.node.as_ref().notifier.get()).mm };
        core::ptr::eq(owner, mm.as_raw())
    }
}

impl Deref for ProcessRef {
    type Target = Process;

    fn deref(&self) -> &Process {
        // SAFETY: by the invariant the node is alive, and only shared references to it exist.
        &unsafe { self.node.as_ref() }.process
    }
}

impl Drop for ProcessRef {
    fn drop(&mut self) {
        // SAFETY: by the invariant there is one count to give back, and nothing uses the node through this value
        // afterwards.
        unsafe { bindings::mmu_notifier_put(self.node.as_ptr().cast()) };
    }
}

/// Dropped when the module goes: waits until every [`Process`] without users is freed.
pub(crate) struct Processes;

impl Drop for Processes {
    fn drop(&mut self) {
        // SAFETY: modules are unloaded where sleeping is allowed; this waits for `notifier_free` calls only.
        unsafe { bindings::mmu_notifier_synchronize() };
    }
}

// SPDX-License-Identifier: GPL-2.0-only
//! Wrappers of the kernel's C interfaces; the module's only file with unsafe code.
//!
//! In this order: for v1, pinned pages and their replacement, the MMU notifier that ties a
//! [`Process`] to an `mm_struct`, RLIMIT_MEMLOCK and CPUID; for views, a window's memory,
//! hypercalls, user mappings and their faults, file operations that `MiscDevice` lacks and the
//! cancelling of delayed work; for PCI slots, places, BARs and static locks.
//!
//! C headers: `include/linux/mm.h`, `include/linux/mmu_notifier.h`, `include/linux/io.h`,
//! `include/linux/fs.h`, `include/linux/pci.h`, `include/crypto/sha2.h`.

use core::arch::x86_64::__cpuid;
use core::ffi::{c_int, c_long, c_ulong, c_void};
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use core::sync::atomic::{compiler_fence, Ordering};

use kernel::bindings;
use kernel::device::{Core, DeviceContext};
use kernel::error::{from_err_ptr, to_result};
use kernel::fs::File;
use kernel::iov::{IovIterDest, IovIterSource};
use kernel::miscdevice::MiscDeviceOptions;
use kernel::mm::virt::{flags, VmaNew, VmaRef};
use kernel::mm::{Mm, MmWithUser};
use kernel::pci;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::atomic::{Acquire, Atomic, Relaxed, Release};
use kernel::sync::poll::PollTable;
use kernel::sync::Arc;
use kernel::transmute::{AsBytes, FromBytes};
use kernel::types::{ForeignOwnable, Opaque};
use kernel::workqueue::{HasDelayedWork, Work, WorkItem};

use crate::abi::hypercall::{
    AttachRequest, AttachResult, ATTACH, DETACH, MEM_MAP, MEM_UNMAP, SEEK, UNMAP_ALL,
    UNMAP_ALL_KEEP, UNMAP_ALL_ZERO,
};
use crate::abi::ioctl::PAGE_SIZE;
use crate::abi::native;
use crate::device::OpenFile;
use crate::hypercall::{Method, Request};
use crate::process::Process;
use crate::slots::Slots;

// The kernel's structures are opaque here: only pointers pass.
#[allow(improper_ctypes)]
extern "C" {
    fn kvmmem_vmcall(nr: c_ulong, a0: c_ulong, a1: c_ulong, a2: c_ulong) -> c_long;
    fn kvmmem_doorbell(port: u16, nr: c_ulong, a0: c_ulong, a1: c_ulong, a2: c_ulong) -> c_long;
    fn kvmmem_page_gpa(page: *mut bindings::page) -> u64;
    fn kvmmem_page_is_anonymous(page: *mut bindings::page) -> bool;
    fn kvmmem_charge(mm: *mut bindings::mm_struct) -> c_int;
    fn kvmmem_uncharge(mm: *mut bindings::mm_struct);
    fn kvmmem_is_killed() -> bool;
    fn kvmmem_notifier_get(
        ops: *const bindings::mmu_notifier_ops,
        mm: *mut bindings::mm_struct,
    ) -> *mut bindings::mmu_notifier;
    fn kvmmem_pci_domain(device: *mut bindings::pci_dev) -> c_int;
    // The kernel's own, which `bindings` lacks.
    fn register_reboot_notifier(block: *mut bindings::notifier_block) -> c_int;
    fn unregister_reboot_notifier(block: *mut bindings::notifier_block) -> c_int;
    fn __crypto_memneq(a: *const c_void, b: *const c_void, len: usize) -> c_ulong;
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

/// The SHA-256 of `data`.
pub(crate) fn sha256(data: &[u8]) -> [u8; 32] {
    extern "C" {
        fn sha256(data: *const u8, len: usize, out: *mut u8);
    }
    let mut digest = [0; 32];
    // SAFETY: reads `data`, writes 32 bytes, and keeps neither.
    unsafe { sha256(data.as_ptr(), data.len(), digest.as_mut_ptr()) };
    digest
}

/// Whether two digests are equal, in a time that does not tell where they differ.
pub(crate) fn is_equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    // SAFETY: reads 32 bytes of each.
    unsafe { __crypto_memneq(a.as_ptr().cast(), b.as_ptr().cast(), 32) == 0 }
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

/// One hypercall. Returns 0 or the host's error.
///
/// # Safety
///
/// MEM_MAP and MEM_UNMAP change what is behind a physical page of this machine: the caller must
/// hold that page pinned, and it must be one whose content no kernel code relies on. UNMAP_ALL does
/// so for all pages that MEM_MAP has replaced, and changes their content unless told to keep it.
/// MEM_MAP's first argument must be the address of 32 readable bytes. ATTACH's arguments must be
/// the addresses of an [`AttachRequest`] and of an [`AttachResult`] that nobody else uses; SEEK's
/// second one that of a `u64` that nobody else uses. DETACH ends what is behind a window.
unsafe fn hypercall(method: Method, nr: u64, a0: u64, a1: u64, a2: u64) -> i64 {
    match method {
        // SAFETY: the shim follows the ABI of `crate::abi::hypercall`, which changes no memory but
        // what the caller vouches for. The module does not load where nobody answers,
        // unless root forces it to.
        Method::Vmcall => unsafe { kvmmem_vmcall(nr, a0, a1, a2) },
        // SAFETY: the shim follows the same ABI, whose conditions the caller vouches for. Reading a
        // port that no device serves yields -1.
        Method::Doorbell(port) => unsafe { kvmmem_doorbell(port, nr, a0, a1, a2) },
    }
}

/// A page of user memory, pinned for long and writable, so that it keeps its place in physical
/// memory and is not shared with another process by copy-on-write. Unpinned when dropped.
///
/// # Invariants
///
/// `page` is a page that `pin_user_pages_fast` returned and that was not unpinned since.
pub(crate) struct PinnedPage {
    page: NonNull<bindings::page>,
}

// SAFETY: a pin belongs to no thread; `unpin_user_pages_dirty_lock` may be called from any that may
// sleep.
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

    /// Whether the page is anonymous, and neither KSM's nor hugetlb's nor a device's. Pinned for
    /// writing, such a page belongs to one process only.
    pub(crate) fn is_anonymous(&self) -> bool {
        // SAFETY: the page is pinned by the type's invariant, so its `struct page` is valid.
        unsafe { kvmmem_page_is_anonymous(self.page.as_ptr()) }
    }

    /// Has the host replace the page by the target's that `request` names. The host's error unpins
    /// the page.
    pub(crate) fn replace(self, request: &Request, method: Method) -> Result<ReplacedPage, i64> {
        let (target_gpa, _) = request.addresses();
        let token = request.bytes().as_ptr() as u64;
        // SAFETY: the page is pinned by the type's invariant; it is user memory, which the kernel
        // only moves bytes to and from; `request` keeps the token's 32 bytes in place
        // during the call.
        match unsafe { hypercall(method, MEM_MAP, token, target_gpa, self.gpa()) } {
            // INVARIANT: pinned, and replaced as of now.
            0 => Ok(ReplacedPage {
                pinned: ManuallyDrop::new(self),
            }),
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
        // SAFETY: the page is pinned by the type's invariant, and the pin goes with this value.
        // Dirty, because the host may have changed its content behind the page tables'
        // back. Runs where sleeping is allowed: in ioctl, release and the notifier's
        // release; the notifier's free drops `ReplacedPage` only.
        unsafe { bindings::unpin_user_pages_dirty_lock(&mut page, 1, true) };
    }
}

/// A pinned page behind which the host has put another machine's memory. Dropping it leaks the
/// page: only the host's consent makes it safe to unpin.
///
/// # Invariants
///
/// The page is pinned, and the host agreed to replace it and has not agreed to undo that.
pub(crate) struct ReplacedPage {
    pinned: ManuallyDrop<PinnedPage>,
}

impl ReplacedPage {
    /// Has the host put the page's own memory back, as zeros. A refusal keeps the page replaced.
    pub(crate) fn restore(self, method: Method) -> Result<PinnedPage, Self> {
        // SAFETY: the page is pinned and replaced by the type's invariants.
        match unsafe { hypercall(method, MEM_UNMAP, self.pinned.gpa(), 0, 0) } {
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

/// Has [`hypercall::close_pages`] called when the machine goes down or starts another kernel. Not
/// any more once dropped.
///
/// # Invariants
///
/// The notifier is registered, and no other code has its address.
///
/// [`hypercall::close_pages`]: crate::hypercall::close_pages
pub(crate) struct RebootHook(KBox<Opaque<bindings::notifier_block>>);

// SAFETY: the notifier is reached by the kernel's chain only, under the chain's lock.
unsafe impl Send for RebootHook {}
// SAFETY: a shared reference gives no access to the notifier.
unsafe impl Sync for RebootHook {}

impl RebootHook {
    pub(crate) fn register() -> Result<Self> {
        let block = bindings::notifier_block {
            notifier_call: Some(on_reboot),
            ..pin_init::zeroed()
        };
        let block = KBox::new(Opaque::new(block), GFP_KERNEL)?;
        // SAFETY: the block is on the heap and stays there until `drop` has taken it off the chain.
        to_result(unsafe { register_reboot_notifier(block.get()) })?;
        // INVARIANT: just registered.
        Ok(Self(block))
    }
}

impl Drop for RebootHook {
    fn drop(&mut self) {
        // SAFETY: registered by the invariant. On return the chain does not call it, and no call is
        // under way: the chain's lock is held for writing while the block is taken off.
        unsafe { unregister_reboot_notifier(self.0.get()) };
    }
}

extern "C" fn on_reboot(
    _block: *mut bindings::notifier_block,
    _action: usize,
    _data: *mut c_void,
) -> c_int {
    crate::hypercall::close_pages();
    // NOTIFY_DONE.
    0
}

/// A [`Process`] as the MMU notifiers know it. They allocate one per `mm_struct`, count its users,
/// and free it after the last `mmu_notifier_put` and a grace period.
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
        // SAFETY: nobody moves the node from here on: only the notifiers know it, and
        // `notifier_free` frees it.
        Ok(node) => KBox::into_raw(unsafe { Pin::into_inner_unchecked(node) }).cast(),
        Err(error) => error.to_ptr(),
    }
}

/// # Safety
///
/// `notifier` came from [`notifier_alloc`] and is not freed during the call.
unsafe extern "C" fn notifier_release(
    notifier: *mut bindings::mmu_notifier,
    _mm: *mut bindings::mm_struct,
) {
    // SAFETY: by the function's contract `notifier` is the first field of a live `Node`, of which
    // only shared references exist.
    let node = unsafe { &*notifier.cast::<Node>() };
    node.process.exited();
}

/// # Safety
///
/// `notifier` came from [`notifier_alloc`] and nobody uses it any more.
unsafe extern "C" fn notifier_free(notifier: *mut bindings::mmu_notifier) {
    // SAFETY: by the function's contract this is the pointer of `KBox::into_raw`, and ours alone.
    // It stays pinned until it is dropped in place.
    drop(unsafe { Pin::new_unchecked(KBox::from_raw(notifier.cast::<Node>())) });
}

/// A counted reference to the [`Process`] of an `mm_struct`.
///
/// # Invariants
///
/// `node` is what `mmu_notifier_get` returned for [`NOTIFIER_OPS`], and this value owns one of its
/// counts.
pub(crate) struct ProcessRef {
    node: NonNull<Node>,
}

// SAFETY: `Process` may be shared between threads, and `mmu_notifier_put` may be called from any.
unsafe impl Send for ProcessRef {}
// SAFETY: a shared `ProcessRef` only gives shared access to a `Process`.
unsafe impl Sync for ProcessRef {}

impl ProcessRef {
    /// The calling process's; the first call creates it. `EINVAL` for a kernel thread; with a
    /// signal pending, an error that has the system call restarted, as the locks cannot be
    /// taken then.
    pub(crate) fn of_current() -> Result<Self> {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        // SAFETY: `mm` is the caller's, so it has users during the call; the operations are of this
        // module, which the file being opened keeps loaded, and no lock of the `mm_struct`
        // is held.
        let notifier = from_err_ptr(unsafe { kvmmem_notifier_get(&NOTIFIER_OPS, mm.as_raw()) })
            .map_err(|error| {
                if error == EINTR {
                    ERESTARTNOINTR
                } else {
                    error
                }
            })?;
        // INVARIANT: `mmu_notifier_get` counted us; `notifier_alloc` returned the node, which is
        // not null.
        Ok(Self {
            node: NonNull::new(notifier.cast()).ok_or(ENOMEM)?,
        })
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
        // SAFETY: by the invariant there is one count to give back, and nothing uses the node
        // through this value afterwards.
        unsafe { bindings::mmu_notifier_put(self.node.as_ptr().cast()) };
    }
}

/// Dropped when the module goes: waits until every [`Process`] without users is freed.
pub(crate) struct Processes;

impl Drop for Processes {
    fn drop(&mut self) {
        // SAFETY: modules are unloaded where sleeping is allowed; this waits for `notifier_free`
        // calls only.
        unsafe { bindings::mmu_notifier_synchronize() };
    }
}

// SAFETY: fixed-width integers without padding, so every byte is initialised.
unsafe impl AsBytes for native::Info {}
// SAFETY: fixed-width integers without padding, so every byte is initialised.
unsafe impl AsBytes for native::Ranges {}
// SAFETY: fixed-width integers without padding, so every byte is initialised.
unsafe impl AsBytes for native::Range {}
// SAFETY: fixed-width integers without padding, so every byte is initialised.
unsafe impl AsBytes for native::Stats {}
// SAFETY: fixed-width integers, for which every bit pattern is valid.
unsafe impl FromBytes for native::Ranges {}

/// Timer ticks a second: how fine delays are.
pub(crate) const TICKS_PER_SECOND: u32 = bindings::CONFIG_HZ;

/// Who calls: the process's number in the initial namespace, its user, its name.
pub(crate) fn caller() -> (u32, u32, [u8; 16]) {
    let task = current!();
    // SAFETY: the pointer is the current task's. Another thread may be changing the name, which
    // these volatile reads bear: it is a hint for an audit log.
    let comm = unsafe {
        core::ptr::addr_of!((*task.as_ptr()).comm)
            .cast::<[u8; 16]>()
            .read_volatile()
    };
    // SAFETY: the initial namespace is never freed.
    let uid =
        unsafe { bindings::from_kuid(&raw mut bindings::init_user_ns, task.uid().into_raw()) };
    (task.tgid().unsigned_abs(), uid, comm)
}

/// Whether the calling process is about to be killed.
pub(crate) fn is_killed() -> bool {
    // SAFETY: looks at the current task only.
    unsafe { kvmmem_is_killed() }
}

/// Whether the CPU has pages of 1 GiB.
pub(crate) fn has_1g_pages() -> bool {
    const PDPE1GB: u32 = 1 << 26;
    let [highest, ..] = cpuid(0x8000_0000);
    let [.., edx] = cpuid(0x8000_0001);
    highest >= 0x8000_0001 && edx & PDPE1GB != 0
}

/// Has the host open a view. The host's error is an `Err`.
pub(crate) fn attach(
    method: Method,
    request: &[u8; AttachRequest::SIZE],
    result: &mut AttachResult,
) -> Result<(), i64> {
    let result: *mut AttachResult = result;
    // SAFETY: both are borrowed during the call, the result exclusively; any bytes make an
    // `AttachResult`.
    match unsafe { hypercall(method, ATTACH, request.as_ptr() as u64, result as u64, 0) } {
        0 => Ok(()),
        error => Err(error),
    }
}

/// Has the host close the view whose descriptor page is at `descriptor_gpa`.
pub(crate) fn detach(method: Method, descriptor_gpa: u64) -> Result<(), i64> {
    // SAFETY: what is behind the window changes for the host's own views only, to which no
    // reference exists: all access is by raw pointer.
    match unsafe { hypercall(method, DETACH, descriptor_gpa, 0, 0) } {
        0 => Ok(()),
        error => Err(error),
    }
}

/// Says that pages which a kernel before this one had replaced were given back: those that are
/// replaced now are this module's.
pub(crate) struct GivenBack(Method);

impl GivenBack {
    /// Has the host give back the pages that a kernel before this one replaced; they keep their
    /// content.
    pub(crate) fn keep_all(method: Method) -> Result<Self, i64> {
        // SAFETY: changes what is behind pages that MEM_MAP has replaced. They keep their content,
        // which is all that a kernel can rely on of RAM that it takes for its own.
        match unsafe { hypercall(method, UNMAP_ALL, UNMAP_ALL_KEEP, 0, 0) } {
            0 => Ok(Self(method)),
            error => Err(error),
        }
    }

    /// Has the host give all replaced pages back, which hold zeros then.
    pub(crate) fn zero_all(&self) -> Result<(), i64> {
        // SAFETY: the pages that are replaced now are this module's, by what this type says. They
        // are user memory, pinned or quarantined, on whose content no kernel code relies.
        match unsafe { hypercall(self.0, UNMAP_ALL, UNMAP_ALL_ZERO, 0, 0) } {
            0 => Ok(()),
            error => Err(error),
        }
    }
}

/// Has the host look for data or a hole of the target, from `gpa` on.
pub(crate) fn seek(
    method: Method,
    descriptor_gpa: u64,
    gpa: &mut u64,
    what: u64,
) -> Result<(), i64> {
    let gpa: *mut u64 = gpa;
    // SAFETY: the address is that of a number which is borrowed exclusively during the call.
    match unsafe { hypercall(method, SEEK, descriptor_gpa, gpa as u64, what) } {
        0 => Ok(()),
        error => Err(error),
    }
}

/// Memory that another machine may change at any time: no reference to its bytes exists.
///
/// # Invariants
///
/// `address` is a mapping of the `len` bytes at `gpa`, whole pages: a [`Memremap`]'s, which keeps
/// it.
pub(crate) struct Memory {
    address: NonNull<u8>,
    gpa: u64,
    len: usize,
    /// Whether large pages can be inserted for it.
    is_write_back: bool,
}

// SAFETY: the mapping belongs to no thread.
unsafe impl Send for Memory {}
// SAFETY: shared access is volatile or by the kernel's copies, which bear concurrent changes.
unsafe impl Sync for Memory {}

impl Memory {
    /// Whether there can be foreign memory: whole pages that the CPU can address and that are no
    /// RAM of this machine.
    pub(crate) fn is_possible(gpa: u64, len: u64) -> bool {
        // SAFETY: written when the CPU was found, long before modules are loaded.
        let bits = unsafe { bindings::boot_cpu_data.x86_phys_bits };
        let limit = 1u64.checked_shl(bits.into()).unwrap_or(u64::MAX);
        let (ram, any) = (
            bindings::IORESOURCE_SYSTEM_RAM as usize,
            bindings::IORES_DESC_NONE as usize,
        );
        len > 0
            && (gpa | len) % PAGE_SIZE == 0
            && gpa.checked_add(len).is_some_and(|end| end <= limit)
            // SAFETY: any range may be asked about.
            && unsafe { bindings::region_intersects(gpa, len as usize, ram, any) } == bindings::REGION_DISJOINT as c_int
    }

    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    /// The first guest-physical address, of this machine.
    pub(crate) fn gpa(&self) -> u64 {
        self.gpa
    }

    /// The number at `offset`, a multiple of 8; 0 outside of the memory.
    pub(crate) fn read_u64(&self, offset: usize) -> u64 {
        if offset % 8 != 0 || offset >= self.len {
            return 0;
        }
        // SAFETY: within the mapping by the type's invariant, whose length is whole pages, and
        // aligned as it is.
        u64::from_le(unsafe {
            self.address
                .as_ptr()
                .add(offset)
                .cast::<u64>()
                .read_volatile()
        })
    }

    /// Writes the number at `offset`, a multiple of 8; nothing outside of the memory.
    pub(crate) fn write_u64(&self, offset: usize, value: u64) {
        if offset % 8 == 0 && offset < self.len {
            // SAFETY: within the mapping by the type's invariant, whose length is whole pages, and
            // aligned as it is. No reference to the bytes exists.
            unsafe {
                self.address
                    .as_ptr()
                    .add(offset)
                    .cast::<u64>()
                    .write_volatile(value.to_le())
            };
        }
    }

    /// Writes the number at `offset`, a multiple of 4; nothing outside of the memory.
    pub(crate) fn write_u32(&self, offset: usize, value: u32) {
        if offset % 4 == 0 && offset < self.len {
            // SAFETY: within the mapping by the type's invariant, whose length is whole pages, and
            // aligned as it is. No reference to the bytes exists.
            unsafe {
                self.address
                    .as_ptr()
                    .add(offset)
                    .cast::<u32>()
                    .write_volatile(value.to_le())
            };
        }
    }

    /// Copies from `offset` on; short where the memory ends or the reader's buffer cannot be
    /// written without a page fault. `None` where `is_valid` says afterwards that these were
    /// not the right bytes: the iterator is where it was, and what the buffer holds there does
    /// not count.
    pub(crate) fn copy_to(
        &self,
        offset: u64,
        len: usize,
        to: &mut IovIterDest<'_>,
        is_valid: impl FnOnce() -> bool,
    ) -> Option<usize> {
        let (from, len) = self.part(offset, len)?;
        let no_faults = NoPageFaults::new();
        // SAFETY: `from` and `len` are within the mapping; the copy bears that the bytes change.
        // `to` is valid.
        let copied = unsafe { bindings::_copy_to_iter(from.cast(), len, to.as_raw()) };
        drop(no_faults);
        if is_valid() {
            return Some(copied);
        }
        // SAFETY: gives back what was taken just now.
        unsafe { to.revert(copied) };
        None
    }

    /// Copies to `offset` on; otherwise as [`Self::copy_to`].
    pub(crate) fn copy_from(
        &self,
        offset: u64,
        len: usize,
        from: &mut IovIterSource<'_>,
        is_valid: impl FnOnce() -> bool,
    ) -> Option<usize> {
        let (to, len) = self.part(offset, len)?;
        let no_faults = NoPageFaults::new();
        // SAFETY: `to` and `len` are within the mapping, to whose bytes no reference exists. `from`
        // is valid.
        let copied = unsafe { bindings::_copy_from_iter(to.cast(), len, from.as_raw()) };
        drop(no_faults);
        if is_valid() {
            return Some(copied);
        }
        // SAFETY: gives back what was taken just now.
        unsafe { from.revert(copied) };
        None
    }

    fn part(&self, offset: u64, len: usize) -> Option<(*mut u8, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let room = self.len.checked_sub(offset)?;
        // SAFETY: `offset` is at most the mapping's length.
        Some((unsafe { self.address.as_ptr().add(offset) }, len.min(room)))
    }
}

/// Makes accesses of this thread to user memory fail where they would need a page:
/// `pagefault_disable()`. Whoever uses another machine's memory is done with it in a short time
/// then, whatever the process does with its own memory.
struct NoPageFaults(PhantomData<*const ()>);

impl NoPageFaults {
    fn new() -> Self {
        // SAFETY: the current task's own counter, which nobody else changes.
        unsafe { (*bindings::get_current()).pagefault_disabled += 1 };
        compiler_fence(Ordering::SeqCst);
        Self(PhantomData)
    }
}

impl Drop for NoPageFaults {
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        // SAFETY: the current task's own counter, which no other task changes. The task is the one
        // that raised it, as this value is not `Send`.
        unsafe { (*bindings::get_current()).pagefault_disabled -= 1 };
    }
}

/// Gets the pages that the next `len` bytes of `to` need. Whether at least one byte can be written
/// now.
pub(crate) fn fault_in_destination(to: &mut IovIterDest<'_>, len: usize) -> bool {
    // SAFETY: the iterator is valid, and the caller may sleep.
    unsafe { bindings::fault_in_iov_iter_writeable(to.as_raw(), len) < len }
}

/// Gets the pages that the next `len` bytes of `from` need. Whether at least one byte can be read
/// now.
pub(crate) fn fault_in_source(from: &mut IovIterSource<'_>, len: usize) -> bool {
    // SAFETY: the iterator is valid, and the caller may sleep.
    unsafe { bindings::fault_in_iov_iter_readable(from.as_raw(), len) < len }
}

/// Guest-physical memory outside of this machine's RAM, mapped into the kernel. User space gets the
/// same memory type: `vmf_insert_pfn` takes that of whoever has reserved the range, and uncached
/// where nobody has.
///
/// # Invariants
///
/// `memremap` returned the mapping, and none of the memory is System RAM.
pub(crate) struct Memremap(Memory);

impl Memremap {
    /// Maps memory so that it is cached: write-back, or write-through where MTRRs prescribe
    /// uncached memory. `EINVAL` where there can be none, `EOPNOTSUPP` where it cannot be
    /// cached, `ENOMEM` where there is no room.
    pub(crate) fn map(gpa: u64, len: u64) -> Result<Self> {
        // One at a time: whoever maps a range while it is uncached gets no other type.
        let _one = caching();
        for flags in [bindings::MEMREMAP_WB, bindings::MEMREMAP_WT] {
            let mut mapped = Self::map_as(gpa, len, flags as usize)?;
            mapped.0.is_write_back = match mapped.caching() {
                Caching::WriteBack => true,
                Caching::WriteThrough => false,
                Caching::Other => continue,
            };
            return Ok(mapped);
        }
        Err(EOPNOTSUPP)
    }

    /// Maps memory, cached or not. `EINVAL` where there can be none, `ENOMEM` where there is no
    /// room.
    pub(crate) fn map_any(gpa: u64, len: u64) -> Result<Self> {
        Self::map_as(gpa, len, bindings::MEMREMAP_WB as usize)
    }

    fn map_as(gpa: u64, len: u64, flags: usize) -> Result<Self> {
        if !Memory::is_possible(gpa, len) {
            return Err(EINVAL);
        }
        let size = usize::try_from(len)?;
        // SAFETY: the range is whole pages that the CPU can address and is not RAM.
        let address = unsafe { bindings::memremap(gpa, size, flags) };
        let address = NonNull::new(address.cast()).ok_or(ENOMEM)?;
        // INVARIANT: just mapped, and checked to hold no RAM.
        Ok(Self(Memory {
            address,
            gpa,
            len: size,
            is_write_back: false,
        }))
    }

    /// The type of the mapping: `memremap` does not say whether it is the one that was asked for.
    fn caching(&self) -> Caching {
        let mut level = 0;
        // SAFETY: by the invariant the address is mapped, and its tables stay while it is.
        let bits = unsafe {
            let entry = bindings::lookup_address(self.0.address.as_ptr() as usize, &mut level);
            if entry.is_null() {
                return Caching::Other;
            }
            (*entry).pte
        };
        let is_small = level == bindings::pg_level_PG_LEVEL_4K;
        let pat = if is_small {
            bindings::_PAGE_BIT_PAT
        } else {
            bindings::_PAGE_BIT_PAT_LARGE
        };
        let is_set = |bit: u32| bits >> bit & 1 != 0;
        // As Linux programs the page attribute table.
        match (
            is_set(pat),
            is_set(bindings::_PAGE_BIT_PCD),
            is_set(bindings::_PAGE_BIT_PWT),
        ) {
            (_, false, false) => Caching::WriteBack,
            (true, true, true) => Caching::WriteThrough,
            _ => Caching::Other,
        }
    }
}

/// How memory is cached.
enum Caching {
    WriteBack,
    WriteThrough,
    Other,
}

impl Deref for Memremap {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        &self.0
    }
}

impl Drop for Memremap {
    fn drop(&mut self) {
        // SAFETY: by the invariant `memremap` returned it, and nobody uses it afterwards. Page
        // tables that still show the range lead to what is no RAM; and to no device that
        // could have gone, as a view zaps its pages before it lets go of a window, and a
        // device waits for that.
        unsafe { bindings::memunmap(self.0.address.as_ptr().cast()) };
    }
}

/// The pages that user space has mapped of the device, by all of its open files.
///
/// # Invariants
///
/// `inode` is a counted reference to the device's inode, `mapping` the address space that its open
/// files use.
pub(crate) struct AddressSpace {
    inode: NonNull<bindings::inode>,
    mapping: NonNull<bindings::address_space>,
}

// SAFETY: reference counts and address spaces belong to no thread.
unsafe impl Send for AddressSpace {}
// SAFETY: shared access only zaps, which any thread may.
unsafe impl Sync for AddressSpace {}

impl AddressSpace {
    pub(crate) fn of(file: &File) -> Result<Self> {
        // SAFETY: an open file has a mapping, which does not change, and that has an inode, which
        // the file keeps.
        let (mapping, inode) = unsafe {
            let mapping = (*file.as_ptr()).f_mapping;
            (mapping, (*mapping).host)
        };
        let (Some(inode), Some(mapping)) = (NonNull::new(inode), NonNull::new(mapping)) else {
            return Err(EINVAL);
        };
        // SAFETY: the file holds a reference. INVARIANT: the mapping is the inode's, and lives as
        // long.
        unsafe { bindings::ihold(inode.as_ptr()) };
        Ok(Self { inode, mapping })
    }

    /// Takes all pages between two target GPAs from every process. The address space is shared by
    /// all files of the device: pages of other files at these offsets go too, and come back by
    /// a fault.
    pub(crate) fn zap(&self, gpa: u64, len: u64) {
        let (Ok(gpa), Ok(len)) = (i64::try_from(gpa), i64::try_from(len)) else {
            return;
        };
        // A length of 0 would mean everything.
        if len > 0 {
            // SAFETY: the mapping is alive by the type's invariant; any range may be given.
            unsafe { bindings::unmap_mapping_range(self.mapping.as_ptr(), gpa, len, 1) };
        }
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // SAFETY: gives back the reference of the type's invariant, where sleeping is allowed.
        unsafe { bindings::iput(self.inode.as_ptr()) };
    }
}

/// Lets the pages of a shared area come by faults; `number` comes back with each of them. `EINVAL`
/// for a private one, and for one of another device.
pub(crate) fn fill_by_faults(area: &VmaNew, number: usize) -> Result {
    let vma = area.as_ptr();
    // SAFETY: the area is valid, and so is its file, if it has one, which does not change while the
    // area is set up.
    let is_ours = unsafe {
        let file = (*vma).vm_file;
        !file.is_null() && core::ptr::eq((*file).f_op, &FILE_OPERATIONS.0)
    };
    if !is_ours || area.flags() & flags::MAYSHARE == 0 {
        return Err(EINVAL);
    }
    // SAFETY: the area is being set up, so that no other thread uses it. Its file has this device's
    // operations, so the functions of `AREA_OPERATIONS` find an `OpenFile` there. VM_PFNMAP is
    // valid for it: it is not private, and gets its pages from `vmf_insert_pfn` only.
    unsafe {
        (*vma).__bindgen_anon_2.vm_flags |= flags::PFNMAP | flags::DONTEXPAND | flags::DONTDUMP;
        (*vma).vm_ops = &AREA_OPERATIONS.0;
        (*vma).vm_private_data = number as *mut c_void;
    }
    Ok(())
}

/// A table of functions of the kernel's, which holds pointers too.
struct Operations<T>(T);

// SAFETY: never written.
unsafe impl<T> Sync for Operations<T> {}

static AREA_OPERATIONS: Operations<bindings::vm_operations_struct> =
    Operations(bindings::vm_operations_struct {
        open: Some(area_open),
        close: Some(area_close),
        fault: Some(area_fault),
        huge_fault: Some(area_huge_fault),
        ..pin_init::zeroed()
    });

/// The open file whose area this is.
///
/// # Safety
///
/// `vma` was given to [`fill_by_faults`] by a mapping of this device, and is valid and locked.
unsafe fn file_of_area<'a>(vma: *mut bindings::vm_area_struct) -> &'a OpenFile {
    // SAFETY: by the function's contract the area holds a reference to a file of this device, whose
    // private data `MiscDevice` put there when it was opened.
    unsafe { KBox::<OpenFile>::borrow((*(*vma).vm_file).private_data) }
}

/// # Safety
///
/// As [`file_of_area`].
unsafe extern "C" fn area_open(vma: *mut bindings::vm_area_struct) {
    // SAFETY: by the function's contract the area is one of this device's, valid and locked.
    let (file, area) = unsafe { (file_of_area(vma), VmaRef::from_raw(vma)) };
    file.area_opened(area);
}

/// # Safety
///
/// As [`file_of_area`].
unsafe extern "C" fn area_close(vma: *mut bindings::vm_area_struct) {
    // SAFETY: by the function's contract the area is one of this device's, valid and locked.
    let (file, area) = unsafe { (file_of_area(vma), VmaRef::from_raw(vma)) };
    file.area_closed(area);
}

/// # Safety
///
/// As [`file_of_area`], for the area of the fault.
unsafe extern "C" fn area_fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: by the function's contract `vmf` is a fault of one of this device's areas; order 0 is
    // a small page.
    unsafe { area_huge_fault(vmf, 0) }
}

/// # Safety
///
/// As [`file_of_area`], for the area of the fault.
unsafe extern "C" fn area_huge_fault(
    vmf: *mut bindings::vm_fault,
    order: u32,
) -> bindings::vm_fault_t {
    // SAFETY: by the function's contract the fault's area is one of this device's, and locked.
    let file = unsafe { file_of_area((*vmf).__bindgen_anon_1.vma) };
    // INVARIANT: the kernel's, for the time of this call.
    match file.fault(&Fault { vmf, order }) {
        Ok(FaultResult(code)) => code,
        Err(FaultError::Bus) => bindings::vm_fault_reason_VM_FAULT_SIGBUS as bindings::vm_fault_t,
        Err(FaultError::Smaller) => {
            bindings::vm_fault_reason_VM_FAULT_FALLBACK as bindings::vm_fault_t
        }
        Err(FaultError::Memory) => bindings::vm_fault_reason_VM_FAULT_OOM as bindings::vm_fault_t,
    }
}

/// The target's address that an area begins with; `None` beyond all addresses.
pub(crate) fn area_gpa(area: &VmaRef) -> Option<u64> {
    // SAFETY: a `VmaRef` exists only while the area is locked at least for reading.
    let pgoff = unsafe { (*area.as_ptr()).vm_pgoff };
    PAGE_SIZE.checked_mul(pgoff as u64)
}

/// A page that a process needs in one of our areas.
///
/// # Invariants
///
/// `vmf` is a fault being handled, in an area that [`fill_by_faults`] set up.
pub(crate) struct Fault {
    vmf: *mut bindings::vm_fault,
    order: u32,
}

/// A fault that was served.
pub(crate) struct FaultResult(bindings::vm_fault_t);

/// A fault that was not.
pub(crate) enum FaultError {
    /// There is no such memory: SIGBUS.
    Bus,
    /// Not with a page of this size.
    Smaller,
    /// This machine has no memory for it now: the access is tried again.
    Memory,
}

impl Fault {
    fn area(&self) -> *mut bindings::vm_area_struct {
        // SAFETY: by the type's invariant `vmf` is valid.
        unsafe { (*self.vmf).__bindgen_anon_1.vma }
    }

    /// The page's size is 4 KiB, this many times doubled: 0, 9 or 18, as x86 has no others.
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// What to say where there is no memory for this page.
    pub(crate) fn refusal(&self) -> FaultError {
        if self.order == 0 {
            FaultError::Bus
        } else {
            FaultError::Smaller
        }
    }

    /// The number that the area got.
    pub(crate) fn number(&self) -> usize {
        // SAFETY: the type's invariant; the area is locked for reading during a fault.
        unsafe { (*self.area()).vm_private_data as usize }
    }

    /// Whether the area lets the process write.
    pub(crate) fn is_area_writable(&self) -> bool {
        // SAFETY: by the type's invariant the fault has an area, which is locked for reading.
        unsafe { (*self.area()).__bindgen_anon_2.vm_flags & flags::WRITE != 0 }
    }

    /// The target's memory that the page is to show: its address and length. `None` where the page
    /// would not fit into the area.
    pub(crate) fn place(&self) -> Option<(u64, u64)> {
        let size = (PAGE_SIZE as usize) << self.order;
        // SAFETY: by the type's invariant the fault has an area, which is locked for reading.
        let (address, pgoff, start, end) = unsafe {
            let (fault, area) = (&(*self.vmf).__bindgen_anon_1, &*self.area());
            let place = &area.__bindgen_anon_1.__bindgen_anon_1;
            (fault.address, fault.pgoff, place.vm_start, place.vm_end)
        };
        let first = address & !(size - 1);
        if first < start || first.checked_add(size)? > end {
            return None;
        }
        let gpa = PAGE_SIZE
            .checked_mul(pgoff as u64)?
            .checked_sub((address - first) as u64 & !(PAGE_SIZE - 1))?;
        Some((gpa, size as u64))
    }

    /// Maps the page at `offset` of `memory`.
    pub(crate) fn insert(&self, memory: &Memory, offset: u64) -> Result<FaultResult, FaultError> {
        let size = PAGE_SIZE << self.order;
        let gpa = memory.gpa().checked_add(offset).ok_or(self.refusal())?;
        if gpa % size != 0
            || offset
                .checked_add(size)
                .is_none_or(|end| end > memory.len())
        {
            return Err(self.refusal());
        }
        // The kernel gives large pages another type than small ones, as it leaves the attribute's
        // bit where that of small pages is.
        if self.order > 0 && !memory.is_write_back {
            return Err(FaultError::Smaller);
        }
        let pfn = (gpa / PAGE_SIZE) as usize;
        // SAFETY: the type's invariant. The area is VM_PFNMAP and not private, as these functions
        // demand. The pages are within `memory`, which is no RAM of this machine, whatever
        // the process does with them.
        let code = unsafe {
            let (fault, area) = (&(*self.vmf).__bindgen_anon_1, self.area());
            let is_write = (*self.vmf).flags & bindings::fault_flag_FAULT_FLAG_WRITE != 0;
            match self.order {
                0 => bindings::vmf_insert_pfn(area, fault.address & !(PAGE_SIZE as usize - 1), pfn),
                9 => bindings::vmf_insert_pfn_pmd(self.vmf, pfn, is_write),
                18 => bindings::vmf_insert_pfn_pud(self.vmf, pfn, is_write),
                _ => return Err(self.refusal()),
            }
        };
        Ok(FaultResult(code))
    }
}

// Those of `MiscDevice`, and the three that it lacks.
static FILE_OPERATIONS: Operations<bindings::file_operations> =
    Operations(bindings::file_operations {
        llseek: Some(file_llseek),
        poll: Some(file_poll),
        get_unmapped_area: Some(file_get_unmapped_area),
        // SAFETY: `into_raw` points to a constant.
        ..unsafe {
            *MiscDeviceOptions { name: c"kvmmem" }
                .into_raw::<OpenFile>()
                .fops
        }
    });

/// Gives a file the operations that `MiscDevice` lacks. `EINVAL` where it has not those of
/// `MiscDevice` for this device.
pub(crate) fn complete_operations(file: &File) -> Result {
    let address =
        |ioctl: Option<unsafe extern "C" fn(_, _, _) -> _>| ioctl.map(|ioctl| ioctl as usize);
    // SAFETY: an open file has operations, which are constants of a module that the file keeps
    // loaded.
    let operations = unsafe { &*(*file.as_ptr()).f_op };
    if address(operations.unlocked_ioctl) != address(FILE_OPERATIONS.0.unlocked_ioctl) {
        return Err(EINVAL);
    }
    // SAFETY: by the check the file is one of this device, with the private data that both sets of
    // operations expect, and keeps a reference to their owner, this module. A pointer is
    // written whole: a concurrent reader calls one set or the other.
    unsafe { core::ptr::addr_of_mut!((*file.as_ptr()).f_op).write_volatile(&FILE_OPERATIONS.0) };
    Ok(())
}

/// # Safety
///
/// `file` is an open file of this device.
unsafe extern "C" fn file_llseek(file: *mut bindings::file, offset: i64, whence: c_int) -> i64 {
    // SAFETY: by the function's contract the private data is what `MiscDevice` put there.
    let (this, current) = unsafe {
        (
            KBox::<OpenFile>::borrow((*file).private_data),
            (*file).f_pos,
        )
    };
    match this.seek(current, offset, whence.unsigned_abs()) {
        // SAFETY: the file is open, and whoever called holds what guards its position.
        Ok(position) => unsafe { bindings::vfs_setpos(file, position, i64::MAX) },
        Err(error) => error.to_errno().into(),
    }
}

/// # Safety
///
/// `file` is an open file of this device, `table` null or valid.
unsafe extern "C" fn file_poll(
    file: *mut bindings::file,
    table: *mut bindings::poll_table_struct,
) -> u32 {
    // SAFETY: by the function's contract the file is one of this device's and the table null or
    // valid. Polling uses no file position.
    let (this, file, table) = unsafe {
        let this = KBox::<OpenFile>::borrow((*file).private_data);
        (this, File::from_raw_file(file), PollTable::from_raw(table))
    };
    this.poll(file, &table)
}

/// Addresses that are congruent to the target's modulo the largest page that fits.
///
/// # Safety
///
/// `file` is an open file of this device.
unsafe extern "C" fn file_get_unmapped_area(
    file: *mut bindings::file,
    hint: usize,
    len: usize,
    pgoff: usize,
    mmap_flags: usize,
) -> usize {
    const MAX_ERRNO: usize = 4095;
    const SIZES: [usize; 2] = [1 << 30, 2 << 20];
    const MAP_FIXED: usize = 0x10;
    // SAFETY: by the function's contract the file is open; any hint and length may be asked for.
    let find =
        |hint, len| unsafe { bindings::mm_get_unmapped_area(file, hint, len, pgoff, mmap_flags) };
    // A wish is left as it is, also the one for address 0.
    if hint == 0 && mmap_flags & MAP_FIXED == 0 {
        for size in SIZES.into_iter().filter(|size| len >= *size) {
            let Some(padded) = len.checked_add(size) else {
                continue;
            };
            let found = find(0, padded);
            if found < MAX_ERRNO.wrapping_neg() {
                return found
                    + (pgoff.wrapping_mul(PAGE_SIZE as usize).wrapping_sub(found) & (size - 1));
            }
        }
    }
    find(hint, len)
}

/// Takes a delayed work from its queue, or waits until it has run. On return it is not queued.
pub(crate) fn cancel<T>(item: &Arc<T>)
where
    T: HasDelayedWork<T> + WorkItem<Pointer = Arc<T>>,
{
    let item = Arc::as_ptr(item);
    // SAFETY: `item` is alive, and `HasDelayedWork` promises that its work is part of a
    // `delayed_work`, which only the workqueue's functions touch. The caller may sleep.
    let was_queued = unsafe {
        let work = Work::raw_get(T::raw_get_work(item.cast_mut()));
        bindings::cancel_delayed_work_sync(kernel::container_of!(
            work,
            bindings::delayed_work,
            work
        ))
    };
    if was_queued {
        // SAFETY: queueing took one count, which running would have given back, and now will not.
        drop(unsafe { Arc::from_raw(item) });
    }
}

kernel::sync::global_lock! {
    // SAFETY: `init_locks` initialises it, and only `slots` takes it, which checks that.
    unsafe(uninit) static SLOTS: Mutex<Slots> = KVec::new();
}

kernel::sync::global_lock! {
    // SAFETY: `init_locks` initialises it, and only `caching` takes it, which checks that.
    unsafe(uninit) static CACHING: Mutex<()> = ();
}

const LOCKS_NEW: i32 = 0;
const LOCKS_BEGUN: i32 = 1;
const LOCKS_READY: i32 = 2;

/// How far the static locks are.
static LOCKS: Atomic<i32> = Atomic::new(LOCKS_NEW);

/// Initialises the static locks: for the module's initialisation, before it registers anything.
/// Again, it does nothing.
pub(crate) fn init_locks() {
    if LOCKS.cmpxchg(LOCKS_NEW, LOCKS_BEGUN, Relaxed).is_ok() {
        // SAFETY: the exchange succeeds once, so each lock is initialised once, and before it can
        // be taken.
        unsafe {
            SLOTS.init();
            CACHING.init();
        }
        LOCKS.store(LOCKS_READY, Release);
    }
}

/// A lock that is not initialised would be undefined behaviour, so its user is stopped.
fn check_locks() {
    assert!(
        LOCKS.load(Acquire) == LOCKS_READY,
        "kvmmem: a lock is used before the module is initialised"
    );
}

/// The slots that are plugged in, locked.
pub(crate) fn slots() -> impl DerefMut<Target = Slots> {
    check_locks();
    SLOTS.lock()
}

/// Held while memory is mapped into the kernel.
fn caching() -> impl Deref<Target = ()> {
    check_locks();
    CACHING.lock()
}

/// Whether this machine has a PCI bus.
pub(crate) fn has_pci_bus() -> bool {
    // SAFETY: begins a walk over the buses; only whether there is one is looked at.
    !unsafe { bindings::pci_find_next_bus(core::ptr::null()) }.is_null()
}

fn raw<C: DeviceContext>(device: &pci::Device<C>) -> *mut bindings::pci_dev {
    // A transparent wrapper of it.
    core::ptr::from_ref(device).cast_mut().cast()
}

/// Where a function is: its slot's domain (bits 16 to 31), bus (8 to 15) and slot (3 to 7), and its
/// number there.
pub(crate) fn place(device: &pci::Device<Core<'_>>) -> (u32, u32) {
    // SAFETY: the device is valid.
    let domain = unsafe { kvmmem_pci_domain(raw(device)) } as u32;
    let id = u32::from(device.dev_id());
    (domain << 16 | id & !7, id & 7)
}

/// Whether function 0 of the device's slot may be a descriptor's page, and no driver has it: it may
/// come to be ours.
pub(crate) fn is_head_pending(device: &pci::Device<Core<'_>>) -> bool {
    let own = raw(device);
    // SAFETY: both devices are valid, the other one as long as it is counted; what is read of it
    // does not change, but for the driver, which is compared with null only and is a hint.
    unsafe {
        let head = bindings::pci_get_slot((*own).bus, (*own).devfn & !7);
        if head.is_null() {
            return false;
        }
        let is_same_kind = (*head).vendor == (*own).vendor && (*head).device == (*own).device;
        let is_page = bindings::pci_resource_len(head, 2) == PAGE_SIZE;
        let is_free = core::ptr::addr_of!((*head).dev.driver)
            .read_volatile()
            .is_null();
        bindings::pci_dev_put(head);
        is_same_kind && is_page && is_free
    }
}

/// A device whose memory is enabled for this driver. That is undone when dropped; another driver's
/// use of the device, which is counted apart, goes on.
///
/// # Invariants
///
/// The device's count of enablers has one for this value.
pub(crate) struct EnabledDevice<'bound>(&'bound pci::Device);

impl<'bound> EnabledDevice<'bound> {
    pub(crate) fn new(device: &'bound pci::Device<Core<'_>>) -> Result<Self> {
        device.enable_device_mem()?;
        // INVARIANT: just enabled.
        Ok(Self(device))
    }
}

impl Drop for EnabledDevice<'_> {
    fn drop(&mut self) {
        // SAFETY: the device is valid as long as the reference, and gives up the enabling of the
        // type's invariant.
        unsafe { bindings::pci_disable_device(raw(self.0)) };
    }
}

/// A BAR that no other driver claims. User space that is root may still map it through sysfs,
/// unless the kernel has CONFIG_IO_STRICT_DEVMEM. ReleaseWaiter when dropped.
pub(crate) struct BarRegion<'bound> {
    device: &'bound pci::Device,
    bar: c_int,
    start: u64,
    len: u64,
}

impl<'bound> BarRegion<'bound> {
    /// Reserves a BAR of an enabled device: `EBUSY` where somebody has it.
    pub(crate) fn request(device: &'bound pci::Device<Core<'_>>, bar: u32) -> Result<Self> {
        let (start, len) = (device.resource_start(bar)?, device.resource_len(bar)?);
        let bar = c_int::try_from(bar)?;
        // SAFETY: the device is valid and the BAR's number was checked; the name is a constant.
        to_result(unsafe {
            bindings::pci_request_region(raw(device), bar, c"kvmmem".as_char_ptr())
        })?;
        Ok(Self {
            device,
            bar,
            start,
            len,
        })
    }

    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }
}

impl Drop for BarRegion<'_> {
    fn drop(&mut self) {
        // SAFETY: the device outlives its binding to the driver, and the region was requested.
        unsafe { bindings::pci_release_region(raw(self.device), self.bar) };
    }
}

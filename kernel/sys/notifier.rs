// SPDX-License-Identifier: GPL-2.0-only
//! Data of a process's memory, kept by an MMU notifier: one value for each `mm_struct`, counted by
//! its users. C header: `include/linux/mmu_notifier.h`.

use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::NonNull;

use kernel::bindings;
use kernel::error::from_err_ptr;
use kernel::prelude::*;
use kernel::types::Opaque;

// `mm_struct` and `mmu_notifier` are opaque here: only pointers pass.
#[allow(improper_ctypes)]
extern "C" {
    fn kvmmem_notifier_get(
        ops: *const bindings::mmu_notifier_ops,
        mm: *mut bindings::mm_struct,
    ) -> *mut bindings::mmu_notifier;
}

/// What is kept with an `mm_struct`.
pub(crate) trait MmData: Send + Sync + 'static {
    fn new() -> impl PinInit<Self>;

    /// The memory is about to go, because its process ends or executes another program. Pages are
    /// still in place.
    fn exited(&self);
}

/// The value as the MMU notifiers know it. They allocate one for each `mm_struct`, count its users,
/// and free it after the last `mmu_notifier_put` and a grace period.
#[repr(C)]
#[pin_data]
struct Node<T> {
    // First, so that a pointer to the notifier is a pointer to the node.
    notifier: Opaque<bindings::mmu_notifier>,
    #[pin]
    data: T,
}

/// A kind of data. Its address tells its notifiers from others', so it is a static.
pub(crate) struct MmKind<T>(bindings::mmu_notifier_ops, PhantomData<T>);

// SAFETY: never written; it has function pointers only.
unsafe impl<T> Sync for MmKind<T> {}

impl<T: MmData> MmKind<T> {
    pub(crate) const fn new() -> Self {
        let ops = bindings::mmu_notifier_ops {
            release: Some(release::<T>),
            alloc_notifier: Some(alloc::<T>),
            free_notifier: Some(free::<T>),
            ..pin_init::zeroed()
        };
        Self(ops, PhantomData)
    }

    /// The calling process's data; the first call creates it. `EINVAL` for a kernel thread; with a
    /// signal pending, an error that has the system call restarted, as the locks cannot be taken
    /// then. Until the [`Unload`] is dropped, data may be freed.
    pub(crate) fn of_current(&'static self) -> Result<MmRef<T>> {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        // SAFETY: `mm` is the caller's, so it has users during the call; the operations are a
        // static of this module, which the caller's file keeps loaded; no lock of the `mm_struct`
        // is held, as nothing in this module calls this under one (see the locks in the main file).
        let notifier = from_err_ptr(unsafe { kvmmem_notifier_get(&self.0, mm.as_raw()) }).map_err(
            |error| {
                if error == EINTR {
                    ERESTARTNOINTR
                } else {
                    error
                }
            },
        )?;
        // INVARIANT: `mmu_notifier_get` counted us; the notifiers of these operations are nodes of
        // `T`, made by `alloc`.
        Ok(MmRef {
            node: NonNull::new(notifier.cast()).ok_or(ENOMEM)?,
        })
    }
}

extern "C" fn alloc<T: MmData>(_mm: *mut bindings::mm_struct) -> *mut bindings::mmu_notifier {
    let node = KBox::pin_init(
        try_pin_init!(Node { notifier: Opaque::zeroed(), data <- T::new() }? Error),
        GFP_KERNEL_ACCOUNT,
    );
    match node {
        // SAFETY: nothing moves the node from here on: only the notifiers know it, and `free`
        // drops it in place.
        Ok(node) => KBox::into_raw(unsafe { Pin::into_inner_unchecked(node) }).cast(),
        Err(error) => error.to_ptr(),
    }
}

/// # Safety
///
/// `notifier` came from [`alloc`] and is not freed during the call.
unsafe extern "C" fn release<T: MmData>(
    notifier: *mut bindings::mmu_notifier,
    _mm: *mut bindings::mm_struct,
) {
    // SAFETY: by the function's contract `notifier` is the first field of a live node, of which
    // only shared references exist.
    let node = unsafe { &*notifier.cast::<Node<T>>() };
    node.data.exited();
}

/// # Safety
///
/// `notifier` came from [`alloc`] and nothing uses it any more.
unsafe extern "C" fn free<T: MmData>(notifier: *mut bindings::mmu_notifier) {
    // SAFETY: by the function's contract this is the pointer of `KBox::into_raw`, and ours alone.
    // It stays pinned until it is dropped in place.
    drop(unsafe { Pin::new_unchecked(KBox::from_raw(notifier.cast::<Node<T>>())) });
}

/// A counted reference to the data of an `mm_struct`.
///
/// # Invariants
///
/// `node` is what `mmu_notifier_get` returned for a kind of `T`, and this value owns one of its
/// counts.
pub(crate) struct MmRef<T> {
    node: NonNull<Node<T>>,
}

// SAFETY: `T` may be shared between threads, and `mmu_notifier_put` may be called from any.
unsafe impl<T: MmData> Send for MmRef<T> {}
// SAFETY: a shared reference gives shared access to a `T`, which is `Sync`.
unsafe impl<T: MmData> Sync for MmRef<T> {}

impl<T> Deref for MmRef<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: by the invariant the node is alive, and only shared references to it exist.
        &unsafe { self.node.as_ref() }.data
    }
}

impl<T> Drop for MmRef<T> {
    fn drop(&mut self) {
        // SAFETY: by the invariant there is one count to give back, and nothing uses the node
        // through this value afterwards.
        unsafe { bindings::mmu_notifier_put(self.node.as_ptr().cast()) };
    }
}

/// Waits, when the module's unloading drops it, until all data without users is freed.
pub(crate) struct Unload;

impl Drop for Unload {
    fn drop(&mut self) {
        // SAFETY: modules are unloaded where sleeping is allowed; this waits for `free` only.
        unsafe { bindings::mmu_notifier_synchronize() };
    }
}

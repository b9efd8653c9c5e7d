// SPDX-License-Identifier: GPL-2.0-only
//! Value that readers use without a lock while a writer replaces it. C header:
//! `include/linux/srcu.h`.

use core::marker::PhantomData;
use core::ops::Deref;

use kernel::prelude::*;
use kernel::sync::atomic::{Acquire, Atomic, Full};
use kernel::sync::srcu::{Guard, Srcu};
use kernel::sync::LockClassKey;

/// A value on the heap. Readers may sleep.
///
/// # Invariants
///
/// `value` is the pointer of a [`KBox`] that this owns. One that was replaced is freed only after
/// the readers that entered `srcu` before have left it.
#[pin_data(PinnedDrop)]
pub(crate) struct Published<T> {
    #[pin]
    srcu: Srcu,
    value: Atomic<*mut T>,
    _owner: PhantomData<KBox<T>>,
}

// SAFETY: this owns a `T`, which may be sent.
unsafe impl<T: Send> Send for Published<T> {}
// SAFETY: readers on any thread share a `T`, and `replace` sends one to its caller.
unsafe impl<T: Send + Sync> Sync for Published<T> {}

impl<T: Send + Sync> Published<T> {
    pub(crate) fn new(
        value: KBox<T>,
        name: &'static CStr,
        class: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            srcu <- Srcu::new(name, class),
            // INVARIANT: the box is this value's from now on.
            value: Atomic::new(KBox::into_raw(value)),
            _owner: PhantomData,
        })
    }

    /// The value of this moment, which stays while the reader exists.
    pub(crate) fn read(&self) -> Reader<'_, T> {
        let guard = self.srcu.read_lock();
        // SAFETY: the pointer was loaded after `srcu` was entered, so by the type's invariant the
        // value is not freed before the guard is dropped, and only shared references to it exist.
        let value = unsafe { &*self.value.load(Acquire) };
        Reader {
            value,
            _guard: guard,
        }
    }

    /// Replaces the value. Returns the earlier one when no reader has it any more: the caller must
    /// have no reader, or it waits for itself.
    pub(crate) fn replace(&self, next: KBox<T>) -> KBox<T> {
        let before = self.value.xchg(KBox::into_raw(next), Full);
        // Revocation waits for it.
        self.srcu.synchronize_expedited();
        // SAFETY: by the type's invariant this was the pointer of a box, and the exchange gave it
        // to this thread alone. Readers that may have loaded it entered before the exchange, and
        // have left.
        unsafe { KBox::from_raw(before) }
    }
}

#[pinned_drop]
impl<T> PinnedDrop for Published<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: by the type's invariant this is the pointer of a box, and readers borrow `self`,
        // so there is none.
        drop(unsafe { KBox::from_raw(self.value.load(Acquire)) });
    }
}

/// A use of a [`Published`] value.
pub(crate) struct Reader<'a, T> {
    value: &'a T,
    _guard: Guard<'a>,
}

impl<T> Deref for Reader<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value
    }
}

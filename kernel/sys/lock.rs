// SPDX-License-Identifier: GPL-2.0-only
//! Static mutex that needs no call to initialise it.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;

use kernel::prelude::*;
use kernel::sync::atomic::{Acquire, Atomic, Relaxed, Release};
use kernel::sync::{LockClassKey, Mutex, MutexGuard};
use kernel::time::{delay::fsleep, Delta};

const NEW: i32 = 0;
const BEGUN: i32 = 1;
const READY: i32 = 2;

/// A mutex that is initialised when it is first locked. Statics are not dropped: what it holds when
/// the module goes is leaked, so its users leave it empty.
///
/// # Invariants
///
/// `state` only grows. From `READY` on `mutex` is initialised; at `BEGUN`, the thread that set it
/// alone accesses `mutex`.
pub(crate) struct StaticMutex<T> {
    name: &'static CStr,
    class: fn() -> Pin<&'static LockClassKey>,
    state: Atomic<i32>,
    mutex: UnsafeCell<MaybeUninit<Mutex<T>>>,
}

// SAFETY: by the type's invariants one thread writes `mutex`, before any other reads it; a `Mutex`
// may be shared if what it protects may be sent.
unsafe impl<T: Send> Sync for StaticMutex<T> {}

impl<T: Default> StaticMutex<T> {
    /// `class` is `|| static_lock_class!()`, so that each mutex has its own.
    pub(crate) const fn new(
        name: &'static CStr,
        class: fn() -> Pin<&'static LockClassKey>,
    ) -> Self {
        Self {
            name,
            class,
            state: Atomic::new(NEW),
            mutex: UnsafeCell::new(MaybeUninit::uninit()),
        }
    }

    pub(crate) fn lock(&'static self) -> MutexGuard<'static, T> {
        if self.state.load(Acquire) != READY {
            self.initialise();
        }
        // SAFETY: `READY` was seen, so by the type's invariants the mutex is initialised, and only
        // shared references to it exist from then on.
        unsafe { (*self.mutex.get()).assume_init_ref() }.lock()
    }

    fn initialise(&'static self) {
        if self.state.cmpxchg(NEW, BEGUN, Relaxed).is_ok() {
            let init = Mutex::new(T::default(), self.name, (self.class)());
            // SAFETY: the exchange succeeds once, so by the type's invariants this thread alone
            // accesses the cell, which is valid for a write and static, so never moved.
            unsafe { pin_init::raw_init((*self.mutex.get()).as_mut_ptr(), init) };
            self.state.store(READY, Release);
        }
        while self.state.load(Acquire) != READY {
            fsleep(Delta::from_micros(10));
        }
    }
}

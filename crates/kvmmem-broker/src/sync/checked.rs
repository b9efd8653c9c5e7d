// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The locks whose threads `loom_tests` runs in every order: the core's and the outboxes'. Under
//! `cfg(loom)` they are loom's.
//!
//! A test may hold no other lock over one of these: loom would not know who waits.

#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};

#[cfg(not(loom))]
pub(crate) use super::{lock, wait_while};

/// Takes a lock.
#[cfg(loom)]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits while `is_awaited` holds. There is no deadline, so a signal that is lost is a deadlock.
#[cfg(loom)]
pub(crate) fn wait_while<'a, T>(
    changed: &Condvar,
    mut guard: MutexGuard<'a, T>,
    _deadline: std::time::Instant,
    mut is_awaited: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    while is_awaited(&mut guard) {
        guard = changed.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner);
    }
    guard
}

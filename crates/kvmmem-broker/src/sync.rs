// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Locks, and waiting for what they guard.
//!
//! Nothing in this crate leaves what a lock guards half changed, so a lock that a panic has
//! poisoned is as good as before.

pub(crate) mod checked;

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Takes a lock.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits while `is_awaited` holds, until the deadline at most. `changed` is signalled after each
/// change of what the lock guards.
pub(crate) fn wait_while<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    deadline: Instant,
    is_awaited: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    let left = deadline.saturating_duration_since(Instant::now());
    let waited = changed.wait_timeout_while(guard, left, is_awaited);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

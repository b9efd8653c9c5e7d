// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Events of a view that this process itself follows: what a waiting tool has been told, and the
//! threads that wait for more.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::status::{Event, State};

/// The state and the generation of a view are elsewhere, under a lock that is taken after the one
/// in here.
#[derive(Debug)]
pub(super) struct Events {
    /// The last generation that was reported.
    reported: Mutex<u64>,
    changed: Condvar,
}

impl Events {
    pub(super) fn new(generation: u64) -> Self {
        Self { reported: Mutex::new(generation), changed: Condvar::new() }
    }

    /// Waits for something that has not been reported; `now` is the view's state and generation.
    pub(super) fn wait(&self, timeout: Duration, now: impl Fn() -> (State, u64)) -> Option<Event> {
        let deadline = Instant::now().checked_add(timeout);
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match now() {
                (State::Revoked, _) => return Some(Event::Revoked),
                (State::Gone, _) => return Some(Event::Gone),
                (State::Open, generation) if generation > *reported => {
                    *reported = generation;
                    return Some(Event::Changed);
                }
                (State::Open, _) => {}
            }
            let left =
                deadline.map_or(timeout, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            let waited = self.changed.wait_timeout(reported, left);
            reported = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Wakes all threads that wait, after the state or the generation has changed.
    pub(super) fn signal(&self) {
        // Under the lock, so that no thread is between its check and its wait.
        let _reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed.notify_all();
    }
}

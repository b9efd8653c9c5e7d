// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Stops a machine from any thread, and says why a generation of it ended.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Error that ends a machine while it runs: of a vCPU, or of what it shows of targets.
pub type Failure = Box<dyn Error + Send + Sync>;

/// Why a generation of the machine (the time between two resets) ended.
#[derive(Debug)]
pub(crate) enum GenerationEnd {
    PowerOff,
    Reset,
    TripleFault,
    Stopped,
    Failed(Failure),
}

/// Stops a machine from any thread; clones stop the same one.
#[derive(Clone, Default)]
pub struct StopHandle(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Whether `state` says that the generation ends: what the vCPUs look at after every exit.
    is_ending: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Set once, from outside; outlives resets.
    stopped: bool,
    /// What ended this generation; the first one counts.
    ended: Option<GenerationEnd>,
}

impl StopHandle {
    /// Ends the machine; [`crate::run`] returns [`crate::VmExit::Stopped`] unless it ended
    /// otherwise before.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        self.0.is_ending.store(true, Ordering::SeqCst);
        drop(state);
        self.0.changed.notify_all();
    }

    /// Ends this generation for `reason`, unless something else did before. After a reset a failure
    /// still ends the machine.
    pub(crate) fn end(&self, reason: GenerationEnd) {
        let mut state = self.lock();
        let is_worse = matches!(
            (&state.ended, &reason),
            (Some(GenerationEnd::Reset), GenerationEnd::Failed(_))
        );
        if state.ended.is_none() || is_worse {
            state.ended = Some(reason);
        }
        self.0.is_ending.store(true, Ordering::SeqCst);
        drop(state);
        self.0.changed.notify_all();
    }

    /// Whether vCPU threads, and threads that may block for long, should end.
    pub(crate) fn is_ending(&self) -> bool {
        self.0.is_ending.load(Ordering::SeqCst)
    }

    /// Waits until the generation ends.
    pub(crate) fn wait(&self) {
        let mut state = self.lock();
        while !state.stopped && state.ended.is_none() {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes the reason, once the generation's threads are gone. A stop from outside wins over a
    /// reset.
    pub(crate) fn take(&self) -> GenerationEnd {
        let mut state = self.lock();
        self.0.is_ending.store(state.stopped, Ordering::SeqCst);
        match state.ended.take() {
            None => GenerationEnd::Stopped,
            Some(GenerationEnd::Reset) if state.stopped => GenerationEnd::Stopped,
            Some(reason) => reason,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts_and_a_stop_outlives_a_reset() {
        let stop = StopHandle::default();
        stop.end(GenerationEnd::PowerOff);
        stop.end(GenerationEnd::Reset);
        stop.wait();
        assert!(matches!(stop.take(), GenerationEnd::PowerOff));
        assert!(!stop.is_ending());

        stop.end(GenerationEnd::Reset);
        stop.stop();
        assert!(matches!(stop.take(), GenerationEnd::Stopped));
        assert!(stop.is_ending());
    }

    #[test]
    fn a_failure_ends_the_machine_also_where_the_guest_has_asked_for_a_reset() {
        let stop = StopHandle::default();
        stop.end(GenerationEnd::Reset);
        stop.end(GenerationEnd::Failed("memory is still there".into()));
        stop.end(GenerationEnd::Reset);
        assert!(matches!(stop.take(), GenerationEnd::Failed(_)));
    }
}

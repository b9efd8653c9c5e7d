// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Events of the broker, for the views and the pages of a machine: grants that are revoked, targets
//! that change or exit. The guest is not asked.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvmmem_client::vmm::{Target, ViewEvents};

use super::source::{TargetEvents, TargetMemory};
use super::v1::{MapError, MappingEngine};
use super::window::{State, Windows};
use crate::machine::stop::{GenerationEnd, StopHandle};

/// A machine's pages and views, as the source of tokens sees them.
pub(crate) struct Views {
    engine: Arc<MappingEngine>,
    /// Those of the present generation. Locked during an event, so that none is under way once
    /// they were taken away: what the windows hold last would be dropped by the thread that
    /// tells of events, which is itself among it.
    windows: Mutex<Option<Arc<Windows>>>,
    stop: StopHandle,
}

impl Views {
    pub(crate) fn new(engine: Arc<MappingEngine>, stop: StopHandle) -> Self {
        Self { engine, windows: Mutex::new(None), stop }
    }

    /// Takes the views of the machine's next generation in the place of those before.
    pub(crate) fn set_windows(&self, windows: Option<Arc<Windows>>) {
        let before = std::mem::replace(&mut *self.windows(), windows);
        if let Some(before) = before {
            before.close_all();
        }
    }

    fn windows(&self) -> MutexGuard<'_, Option<Arc<Windows>>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the machine where a target's pages cannot be taken from its guest. Returns whether they
    /// were taken.
    fn settle(&self, revoked: Result<(), MapError>) -> bool {
        revoked.map_err(|error| self.stop.end(GenerationEnd::Failed(error.into()))).is_ok()
    }
}

impl ViewEvents for Views {
    /// Not confirmed where memory cannot be taken from the guest: the end of the process, and with
    /// it of its connection, confirms it then.
    fn revoke(&self, grant: u64) -> bool {
        let are_ended = (self.windows().as_ref())
            .is_none_or(|windows| windows.end(State::Revoked, |view| view.grant == grant));
        self.settle(self.engine.revoke(grant)) && are_ended
    }

    fn gone(&self, target: u64) {
        if let Some(windows) = &*self.windows() {
            windows.end(State::Gone, |view| view.is_of(target));
        }
    }

    fn changed(&self, target: &Arc<Target>) {
        let target: Arc<dyn TargetMemory> = target.clone();
        self.memory_changed(&target);
    }

    fn lost(&self) {
        if let Some(windows) = &*self.windows() {
            windows.lost();
        }
        self.settle(self.engine.revoke_all());
    }
}

impl TargetEvents for Views {
    fn memory_changed(&self, target: &Arc<dyn TargetMemory>) {
        if let Some(windows) = &*self.windows() {
            windows.follow(target);
        }
    }
}

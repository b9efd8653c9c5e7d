// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One view of an introspector's, and who is at work on it.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvmmem_abi::native::STATE_OPEN;

use super::descriptor::Pages;
use super::places::Place;
use super::plug::Plug;
use crate::link::{Attached, Region, Rights, Scope};

/// A view from the moment in which its token was used until nothing of it is left in QEMU.
#[derive(Debug)]
pub(super) struct View {
    /// The broker's number for it; 0 where it is what an earlier broker has left.
    pub(super) number: u64,
    pub(super) grant: u64,
    pub(super) target: u64,
    pub(super) scope: Scope,
    /// What it shows of the target.
    pub(super) regions: Vec<Region>,
    /// `None` where an earlier broker had them.
    pub(super) pages: Mutex<Option<Pages>>,
    pub(super) plug: Mutex<Plug>,
    pub(super) places: Mutex<BTreeSet<Place>>,
    life: Mutex<Life>,
    /// Signalled when the phase has changed.
    changed: Condvar,
}

#[derive(Debug)]
struct Life {
    phase: Phase,
    /// What ended it, `STATE_*` of the ABI.
    end: Option<u32>,
}

/// Where a view is between being opened and being gone. One thread at a time is at work on it: in the first of these
/// the one that opens it, in the third the one that ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Opening,
    Open,
    Ending,
    /// The guest has not let go of it, or QEMU not of its memory: tried again from time to time.
    Stuck,
    Closed,
}

impl View {
    pub(super) fn new(attached: &Attached) -> Self {
        let Attached { view, grant, target, scope } = attached;
        Self::with(*view, *grant, target.id(), scope.clone(), scope.regions(target.map()))
    }

    /// What is left of an earlier broker's views.
    pub(super) fn left_over(plug: Plug) -> Self {
        let view = Self::with(0, 0, 0, Scope::whole(Rights::ReadOnly), Vec::new());
        *lock(&view.plug) = plug;
        view.settle(Phase::Stuck);
        view
    }

    fn with(number: u64, grant: u64, target: u64, scope: Scope, regions: Vec<Region>) -> Self {
        Self {
            number,
            grant,
            target,
            scope,
            regions,
            pages: Mutex::default(),
            plug: Mutex::default(),
            places: Mutex::default(),
            life: Mutex::new(Life { phase: Phase::Opening, end: None }),
            changed: Condvar::new(),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        lock(&self.life).phase
    }

    /// What has ended the view, if something has.
    pub(super) fn end(&self) -> Option<u32> {
        lock(&self.life).end
    }

    /// Says that the view ends with this state. Whether it is the caller's to do it: else it is gone, or somebody is at
    /// work on it and will see to it.
    pub(super) fn claim(&self, state: u32) -> bool {
        let mut life = lock(&self.life);
        let is_free = matches!(life.phase, Phase::Open | Phase::Stuck);
        if life.phase != Phase::Closed {
            life.end.get_or_insert(state);
        }
        if is_free {
            life.phase = Phase::Ending;
        }
        is_free
    }

    /// The same for a view that is stuck, and for no other.
    pub(super) fn claim_stuck(&self) -> bool {
        let mut life = lock(&self.life);
        let is_stuck = life.phase == Phase::Stuck;
        if is_stuck {
            life.phase = Phase::Ending;
        }
        is_stuck
    }

    /// The view is open, unless something has ended it meanwhile: then it is the caller's to end it.
    pub(super) fn opened(&self) -> bool {
        let mut life = lock(&self.life);
        life.phase = if life.end.is_none() { Phase::Open } else { Phase::Ending };
        self.changed.notify_all();
        life.end.is_none()
    }

    /// Ends the caller's work.
    pub(super) fn settle(&self, phase: Phase) {
        lock(&self.life).phase = phase;
        self.changed.notify_all();
    }

    /// Waits until nobody is at work on it; returns its phase then, or when time is up.
    pub(super) fn wait_settled(&self, deadline: Instant) -> Phase {
        let left = deadline.saturating_duration_since(Instant::now());
        let is_busy = |life: &mut Life| matches!(life.phase, Phase::Opening | Phase::Ending);
        let waited = self.changed.wait_timeout_while(lock(&self.life), left, is_busy);
        waited.unwrap_or_else(PoisonError::into_inner).0.phase
    }

    /// Tells the guest's driver that the target's memory is where it was and holds something else, unless the view ends.
    pub(super) fn refresh(&self) {
        let life = lock(&self.life);
        if life.phase == Phase::Open && life.end.is_none() {
            self.announce(STATE_OPEN);
        }
    }

    /// Tells the guest's driver that the view is in this state from now on.
    pub(super) fn announce(&self, state: u32) {
        if let Some(pages) = &mut *lock(&self.pages)
            && let Err(error) = pages.set_state(state)
        {
            // A page of memory that is there; and the guest is not trusted to look at it.
            tracing::warn!(view = self.number, %error, "cannot write a view's descriptor");
        }
    }

    /// Whether the guest's driver has acted upon the last change; there is nobody to do so where it never had the page.
    pub(super) fn is_seen(&self) -> bool {
        lock(&self.pages).as_ref().is_none_or(Pages::is_seen)
    }
}

/// Nothing here panics while it holds a lock; were something to, what it left is as good as before.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

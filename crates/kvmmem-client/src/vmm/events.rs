// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that tells a VMM of what happens to its views.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, PoisonError, Weak};

use super::{Shared, Target};

/// Who is told of what happens to views. Called from one thread of the link's own, one event at a
/// time.
///
/// An event may come before the view or the page that it concerns is where the handler looks for
/// it: see [`super::VmmLink::current`] and [`super::VmmLink::is_revoked`].
pub trait ViewEvents: Send + Sync {
    /// A grant was taken back. Returns `true` when no access of the guest can reach the target's
    /// memory by it, neither through a view nor through a page; the link then confirms that to
    /// the broker. `false` where it still can: the handler then calls
    /// [`super::VmmLink::revoked`] once it cannot.
    fn revoke(&self, grant: u64) -> bool;

    /// A target is gone: its views end.
    fn gone(&self, target: u64);

    /// A target's RAM was reset or is elsewhere now: the views of it go on with what `target` says.
    fn changed(&self, target: &Arc<Target>);

    /// The connection to the broker is lost: all views end, for nobody could take their rights back
    /// any more. No new connection is made before this returns; numbers of grants, views and
    /// targets have no meaning there.
    fn lost(&self);
}

/// What waits to be told.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Revoke(u64),
    Gone(u64),
    /// As it is when it is told: changes that follow each other quickly are one.
    Changed(u64),
    Lost,
}

/// The events that wait, and who is to be told.
#[derive(Default)]
pub(super) struct Queue {
    waiting: VecDeque<Event>,
    handler: Option<Weak<dyn ViewEvents>>,
    /// Whether [`ViewEvents::lost`] is still to be called or to return.
    is_losing: bool,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

impl Queue {
    pub(super) fn set_handler(&mut self, handler: Weak<dyn ViewEvents>) {
        self.handler = Some(handler);
    }

    pub(super) fn revoke(&mut self, grant: u64) {
        self.push(Event::Revoke(grant));
    }

    pub(super) fn gone(&mut self, target: u64) {
        self.push(Event::Gone(target));
    }

    pub(super) fn changed(&mut self, target: u64) {
        self.push(Event::Changed(target));
    }

    /// What waits is void: everything ends.
    pub(super) fn lost(&mut self) {
        self.waiting.clear();
        self.push(Event::Lost);
        self.is_losing = true;
    }

    pub(super) fn is_losing(&self) -> bool {
        self.is_losing
    }

    /// An event that waits already says the same: a target that changes all the time makes no
    /// longer queue.
    fn push(&mut self, event: Event) {
        if !self.waiting.contains(&event) {
            self.waiting.push_back(event);
        }
    }
}

/// Tells events until the link is dropped.
pub(super) fn run(shared: &Shared) {
    loop {
        let state = shared.lock();
        let mut state = shared
            .changed
            .wait_while(state, |state| !state.stopped && state.events.waiting.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            return;
        }
        let Some(event) = state.events.waiting.pop_front() else { continue };
        let handler = state.events.handler.clone().and_then(|handler| handler.upgrade());
        let changed = match event {
            Event::Changed(target) => state.cache.target(target),
            _ => None,
        };
        drop(state);
        if let Some(handler) = handler {
            match event {
                Event::Revoke(grant) => {
                    if handler.revoke(grant) {
                        shared.revoked(grant);
                    }
                }
                Event::Gone(target) => handler.gone(target),
                Event::Changed(_) => {
                    if let Some(target) = changed {
                        handler.changed(&target);
                    }
                }
                Event::Lost => handler.lost(),
            }
        }
        if event == Event::Lost {
            shared.lock().events.is_losing = false;
            shared.changed.notify_all();
        }
    }
}

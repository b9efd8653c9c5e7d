// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What happens to the views of a VMM, and who is told.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Weak};

use super::target::Target;

/// Who is told of what happens to views. Called from one thread of the link's own, one event at a
/// time.
///
/// An event may come before the view or the page that it concerns is where the handler looks for
/// it: see [`super::VmmLink::current`] and [`super::VmmLink::is_revoked`].
pub trait ViewEvents: Send + Sync {
    /// A grant was revoked. Returns `true` when no access of the guest can reach the target's
    /// memory by it, neither through a view nor through a page; the link then confirms that to the
    /// broker. `false` where it still can: the handler then calls [`super::VmmLink::revoked`] once
    /// it cannot.
    fn revoke(&self, grant: u64) -> bool;

    /// A target is gone: its views end.
    fn gone(&self, target: u64);

    /// A target's RAM was reset or is elsewhere now: its views continue with what `target` says.
    fn changed(&self, target: &Arc<Target>);

    /// The connection to the broker is lost: all views end, as they could not be revoked any
    /// more. No new connection is made before this returns; numbers of grants, views and
    /// targets have no meaning there.
    fn lost(&self);
}

/// What waits to be told.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    Revoke(u64),
    Gone(u64),
    /// As it is when it is told: changes that follow each other quickly are one.
    Changed(u64),
    Lost,
}

/// The events that wait, and who is to be told.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) waiting: VecDeque<Event>,
    pub(super) handler: Option<Weak<dyn ViewEvents>>,
    /// Whether [`ViewEvents::lost`] is still to be called or to return.
    pub(super) is_losing: bool,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

impl Queue {
    /// What waits is void: everything ends.
    pub(super) fn lost(&mut self) {
        self.waiting.clear();
        self.push(Event::Lost);
        self.is_losing = true;
    }

    /// An event that waits already says the same: a target that changes all the time makes no
    /// longer queue.
    pub(super) fn push(&mut self, event: Event) {
        if !self.waiting.contains(&event) {
            self.waiting.push_back(event);
        }
    }
}

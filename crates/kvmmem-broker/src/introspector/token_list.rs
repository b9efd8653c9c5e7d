// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The list of an introspector's views for tokens: at most one for a target and rights.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use kvmmem_proto::scope::Rights;

use super::token_view::TokenView;

/// How long no view is plugged in after that has failed, at first.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The views of one introspector.
#[derive(Debug, Default)]
pub(super) struct TokenViews {
    pub(super) list: Mutex<List>,
    /// Signalled when a view was plugged in, or was not.
    pub(super) changed: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct List {
    pub(super) entries: Vec<Entry>,
    /// A tool waits: at most one does, so that a silent guest does not take all threads.
    pub(super) is_waiting: bool,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) target: u64,
    rights: Rights,
    pub(super) state: State,
}

#[derive(Debug)]
pub(super) enum State {
    Opening { pause: Duration },
    Open(Arc<TokenView>),
    Failed { until: Instant, pause: Duration },
}

impl Entry {
    fn has_ended(&self) -> bool {
        matches!(&self.state, State::Open(view) if view.view.end().is_some())
    }
}

impl List {
    /// The views that were plugged in, also those that have ended and may have uses to report.
    pub(super) fn open(&self) -> Vec<Arc<TokenView>> {
        let view = |entry: &Entry| match &entry.state {
            State::Open(view) => Some(Arc::clone(view)),
            State::Opening { .. } | State::Failed { .. } => None,
        };
        self.entries.iter().filter_map(view).collect()
    }

    fn position(&self, target: u64, rights: Rights) -> Option<usize> {
        let is_meant = |entry: &Entry| (entry.target, entry.rights) == (target, rights);
        self.entries.iter().position(|entry| is_meant(entry) && !entry.has_ended())
    }

    pub(super) fn find(&mut self, target: u64, rights: Rights) -> Option<&mut State> {
        let entry = self.position(target, rights)?;
        self.entries.get_mut(entry).map(|entry| &mut entry.state)
    }

    pub(super) fn is_opening(&mut self, target: u64, rights: Rights) -> bool {
        matches!(self.find(target, rights), Some(State::Opening { .. }))
    }

    /// What there is for a token now; `Err` where a view is to be plugged in.
    pub(super) fn ready(
        &mut self,
        target: u64,
        rights: Rights,
    ) -> Result<Option<Arc<TokenView>>, Duration> {
        match self.find(target, rights) {
            Some(State::Open(view)) => Ok(Some(Arc::clone(view))),
            Some(State::Failed { until, .. }) if Instant::now() < *until => Ok(None),
            Some(State::Failed { pause, .. } | State::Opening { pause }) => Err(*pause),
            None => Err(FIRST_PAUSE),
        }
    }

    pub(super) fn set(&mut self, target: u64, rights: Rights, state: State) {
        match self.find(target, rights) {
            Some(now) => *now = state,
            None => self.entries.push(Entry { target, rights, state }),
        }
    }
}

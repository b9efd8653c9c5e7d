// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The views of grants.

use std::collections::BTreeSet;
use std::time::Instant;

use kvmmem_proto::message::{Caller, ViewCounters};
use kvmmem_proto::scope::{Rights, Scope};

use super::error::UseError;
use super::grant::{Access, User, View};
use super::table::Grants;
use crate::core::limits::MAX_VIEWS_PER_PEER;

impl Grants {
    /// A grant's target, if a connection has mapped a page by the grant.
    pub(crate) fn mapped(&self, id: u64, by: u64) -> Option<u64> {
        let grant = self.grants.get(&id)?;
        grant.users.contains_key(&by).then_some(grant.terms.target)
    }

    /// Uses the token of a grant that [`Self::would_open`] has found to open a view; returns the
    /// view's number as well.
    ///
    /// # Errors
    /// [`UseError`]; no use is taken then.
    pub(crate) fn attach(
        &mut self,
        now: Instant,
        id: u64,
        by: User,
        (name, caller): (&str, Caller),
        read_only: bool,
    ) -> Result<(u64, Access), UseError> {
        let views = self.views_of_peer.get(&by.peer).map_or(0, BTreeSet::len);
        let view = self.last_view + 1;
        let grant = self.usable_grant(now, id, by)?;
        if views >= MAX_VIEWS_PER_PEER {
            return Err(UseError::TooManyViews);
        }
        let mut opened = grant.take_use(id);
        if read_only {
            opened.scope = opened.scope.at_most(Rights::ReadOnly);
        }
        grant.views.insert(view);
        self.last_view = view;
        let entry = View {
            id: view,
            grant: id,
            target: opened.target,
            peer: by.peer,
            by: name.to_owned(),
            by_uuid: by.uuid,
            caller,
            rights: opened.scope.rights,
            since: now,
            counters: ViewCounters::default(),
            is_closing: false,
        };
        self.views.insert(view, entry);
        self.views_of_peer.entry(by.peer).or_default().insert(view);
        self.settle(now, id);
        Ok((view, opened))
    }

    /// The target of a view and what the view allows, if it is this connection's, is not being
    /// closed and its grant is not revoked.
    pub(crate) fn reach(&self, view: u64, by: u64) -> Option<(u64, Scope)> {
        let view = self.views.get(&view).filter(|view| view.peer == by && !view.is_closing)?;
        let grant = self.grants.get(&view.grant).filter(|grant| !grant.revoked)?;
        Some((view.target, grant.terms.scope.at_most(view.rights)))
    }

    /// Begins to close a view, if it is this connection's: it reaches nothing any more.
    pub(crate) fn begin_close(&mut self, view: u64, by: u64) -> bool {
        let view = self.views.get_mut(&view).filter(|view| view.peer == by);
        view.map(|view| view.is_closing = true).is_some()
    }

    /// Takes a view out, if it is this connection's.
    pub(crate) fn detach(&mut self, now: Instant, view: u64, by: u64) -> Option<View> {
        self.views.get(&view).filter(|view| view.peer == by)?;
        self.close(now, view)
    }

    /// Records a view's counters, if it is this connection's.
    pub(crate) fn count(&mut self, view: u64, by: u64, counters: ViewCounters) -> bool {
        let view = self.views.get_mut(&view).filter(|view| view.peer == by);
        view.map(|view| view.counters = counters).is_some()
    }
}

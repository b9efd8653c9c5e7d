// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of grants: what tokens are good for, and the views that they have opened.
//!
//! Nothing runs when nobody asks: time passes at the next operation. Times come from the caller,
//! who takes them from a monotonic clock. A grant that can no longer be used stays as long as
//! something is open by it, and then for [`KEPT`], so that a list shows it; where there are more
//! than [`MAX_LEAVING`] the oldest of the user or target that has the most leave earlier.

mod end;
mod grant;
mod index;
mod leaving;
mod list;
#[cfg(test)]
mod tests;
mod upkeep;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use kvmmem_proto::message::{Caller, GrantState, Origin, ViewCounters};
use kvmmem_proto::scope::Scope;
use uuid::Uuid;

use crate::core::quota::{Bound, Exceeded, Quota};
pub(crate) use end::Affected;
use grant::Grant;
pub(crate) use grant::{Holder, Terms, User, View};
use index::TokenIndex;
use leaving::Leaving;
pub(crate) use list::Names;

/// How long a token lives that KVMI makes.
pub(crate) const KVMI_LIFETIME: Duration = Duration::from_secs(3);

/// The most tokens of KVMI's that may be outstanding for one target.
pub(crate) const MAX_KVMI_PER_TARGET: usize = 64;

/// The most grants of operators, of all targets, that can be used or are in use.
pub(crate) const MAX_OPERATOR: usize = 16_384;

/// The most views that one connection may have open.
pub(crate) const MAX_VIEWS_PER_PEER: usize = 64;

/// How long a grant is listed that is of no use any more.
pub(crate) const KEPT: Duration = Duration::from_secs(60);

/// The most grants that are listed though they are of no use any more.
pub(crate) const MAX_LEAVING: usize = 1024;

/// The grants of all targets.
#[derive(Clone, Debug)]
pub(crate) struct Grants {
    grants: BTreeMap<u64, Grant>,
    views: BTreeMap<u64, View>,
    tokens: TokenIndex,
    /// When usable grants expire.
    expiring: BTreeSet<(Instant, u64)>,
    /// When grants that are of no use any more leave the table.
    leaving: Leaving,
    /// Usable tokens of KVMI's for each target.
    outstanding: BTreeMap<u64, usize>,
    /// Grants of operators that are not leaving.
    operator: Quota,
    /// Targets and their grants.
    of_target: BTreeSet<(u64, u64)>,
    /// Connections and the grants whose tokens they hold or have used for pages.
    of_peer: BTreeSet<(u64, u64)>,
    views_of_peer: BTreeMap<u64, BTreeSet<u64>>,
    last_grant: u64,
    last_view: u64,
}

/// Why no grant was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MintError {
    /// The target has [`MAX_KVMI_PER_TARGET`] tokens of KVMI's outstanding.
    #[error("target {0} has {MAX_KVMI_PER_TARGET} tokens outstanding; they expire within 3 s")]
    Outstanding(u64),
    /// There are too many grants.
    #[error("grants")]
    Full(#[source] Exceeded),
}

/// Why a token opened nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UseError {
    /// The token is unknown, used, expired, revoked or somebody else's.
    #[error("token is unknown, used, expired or revoked")]
    Unknown,
    /// The token is for the VM that brings it.
    #[error("a VM cannot map its own memory")]
    Own,
    /// The connection has [`MAX_VIEWS_PER_PEER`] views.
    #[error("this connection has {MAX_VIEWS_PER_PEER} views already; close one")]
    TooManyViews,
}

/// What a token opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Opened {
    /// Number of the grant.
    pub(crate) grant: u64,
    /// Number of the target.
    pub(crate) target: u64,
    /// What is allowed.
    pub(crate) scope: Scope,
}

impl Default for Grants {
    fn default() -> Self {
        Self::new(Bound::of(MAX_OPERATOR))
    }
}

impl Grants {
    /// An empty table for so many grants of operators.
    pub(crate) fn new(operator: Bound) -> Self {
        Self {
            grants: BTreeMap::new(),
            views: BTreeMap::new(),
            tokens: TokenIndex::default(),
            expiring: BTreeSet::new(),
            leaving: Leaving::default(),
            outstanding: BTreeMap::new(),
            operator: Quota::new(operator),
            of_target: BTreeSet::new(),
            of_peer: BTreeSet::new(),
            views_of_peer: BTreeMap::new(),
            last_grant: 0,
            last_view: 0,
        }
    }

    /// Makes `token` valid from `now` on; returns the grant's number.
    ///
    /// # Errors
    /// [`MintError`].
    pub(crate) fn mint(
        &mut self,
        now: Instant,
        token: Token,
        terms: Terms,
    ) -> Result<u64, MintError> {
        self.advance(now);
        match terms.origin {
            Origin::Kvmi if self.outstanding(terms.target) >= MAX_KVMI_PER_TARGET => {
                return Err(MintError::Outstanding(terms.target));
            }
            Origin::Kvmi => *self.outstanding.entry(terms.target).or_default() += 1,
            Origin::Operator => self.operator.take(terms.by).map_err(MintError::Full)?,
        }
        self.last_grant += 1;
        let id = self.last_grant;
        self.tokens.insert(&token, id);
        self.of_target.insert((terms.target, id));
        if let Holder::Pushed(peer) = terms.holder {
            self.of_peer.insert((peer, id));
        }
        let grant = Grant::new(now, token, terms);
        self.expiring.insert((grant.expires, id));
        self.grants.insert(id, grant);
        Ok(id)
    }

    /// The target of a token that this user may use now, and what the token allows. No use is
    /// taken.
    ///
    /// # Errors
    /// [`UseError`].
    pub(crate) fn target(
        &mut self,
        now: Instant,
        token: &Token,
        by: User,
    ) -> Result<(u64, Scope), UseError> {
        self.usable(now, token, by)
            .map(|(_, grant)| (grant.terms.target, grant.terms.scope.clone()))
    }

    /// Uses a token for one page. `None` where the token was pushed to this user, and is still
    /// there to be claimed.
    ///
    /// # Errors
    /// [`UseError`]; no use is taken then.
    pub(crate) fn redeem(
        &mut self,
        now: Instant,
        token: &Token,
        by: User,
    ) -> Result<Option<Opened>, UseError> {
        let (id, grant) = self.usable(now, token, by)?;
        if grant.terms.holder == Holder::Pushed(by.peer) {
            return Ok(None);
        }
        let opened = grant.take_use(id);
        grant.users.insert(by.peer);
        self.of_peer.insert((by.peer, id));
        self.settle(now, id);
        Ok(Some(opened))
    }

    /// Takes note that a token was used that had been pushed to this connection.
    pub(crate) fn used(&mut self, now: Instant, token: &Token, by: u64) -> Option<Opened> {
        self.advance(now);
        let id = self.find(token)?;
        let grant = self.grants.get_mut(&id)?;
        // It may have expired on the news' way.
        let may_be = grant.terms.holder == Holder::Pushed(by)
            && matches!(grant.state(now), GrantState::Active | GrantState::Expired);
        if !may_be {
            return None;
        }
        let opened = grant.take_use(id);
        grant.users.insert(by);
        self.of_peer.insert((by, id));
        self.settle(now, id);
        Some(opened)
    }

    /// Uses a token to open a view; returns the view's number as well.
    ///
    /// # Errors
    /// [`UseError`]; no use is taken then.
    pub(crate) fn attach(
        &mut self,
        now: Instant,
        token: &Token,
        by: User,
        (name, caller): (&str, Caller),
        read_only: bool,
    ) -> Result<(u64, Opened), UseError> {
        let views = self.views_of_peer.get(&by.peer).map_or(0, BTreeSet::len);
        let view = self.last_view + 1;
        let (id, grant) = self.usable(now, token, by)?;
        if views >= MAX_VIEWS_PER_PEER {
            return Err(UseError::TooManyViews);
        }
        let mut opened = grant.take_use(id);
        if read_only {
            opened.scope = opened.scope.at_most(kvmmem_proto::scope::Rights::ReadOnly);
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

    /// The target of a view and what the view allows, if it is this connection's, is not being closed
    /// and its grant is not revoked.
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

    /// Takes note of a view's counters, if it is this connection's.
    pub(crate) fn count(&mut self, view: u64, by: u64, counters: ViewCounters) -> bool {
        let view = self.views.get_mut(&view).filter(|view| view.peer == by);
        view.map(|view| view.counters = counters).is_some()
    }

    /// Records that a token could not be pushed to its holder: the introspector with this UUID has
    /// to ask for it.
    pub(crate) fn not_pushed(&mut self, id: u64, holder: Uuid) {
        if let Some(grant) = self.grants.get_mut(&id)
            && let Holder::Pushed(peer) = grant.terms.holder
        {
            grant.terms.holder = Holder::Vm(holder);
            if !grant.users.contains(&peer) {
                self.of_peer.remove(&(peer, id));
            }
        }
    }

    /// How many of KVMI's tokens for a target can be used; [`Self::mint`] leaves the expired ones
    /// out first.
    pub(crate) fn outstanding(&self, target: u64) -> usize {
        self.outstanding.get(&target).copied().unwrap_or(0)
    }

    /// How many grants and views are in the table.
    pub(crate) fn len(&self) -> (usize, usize) {
        (self.grants.len(), self.views.len())
    }

    /// Whether there is a grant of this number.
    #[cfg(test)]
    pub(super) fn contains(&self, id: u64) -> bool {
        self.grants.contains_key(&id)
    }

    /// Whether nothing is in the table.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == (0, 0)
    }

    /// The grant that a token opens for this user.
    fn usable(
        &mut self,
        now: Instant,
        token: &Token,
        by: User,
    ) -> Result<(u64, &mut Grant), UseError> {
        self.advance(now);
        let id = self.find(token).ok_or(UseError::Unknown)?;
        let grant = self.grants.get_mut(&id).ok_or(UseError::Unknown)?;
        if grant.state(now) != GrantState::Active || !grant.terms.holder.is(by) {
            return Err(UseError::Unknown);
        }
        if by.vm == Some(grant.terms.target) {
            return Err(UseError::Own);
        }
        Ok((id, grant))
    }

    fn find(&self, token: &Token) -> Option<u64> {
        self.tokens.find(token, |id| self.grants.get(&id)?.token.as_deref())
    }
}

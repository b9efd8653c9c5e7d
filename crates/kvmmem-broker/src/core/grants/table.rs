// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of grants and views.
//!
//! Time passes at the next operation, by the caller's monotonic clock. A grant that can no longer
//! be used stays while something is open by it, and then for a minute, so that lists show it;
//! beyond `MAX_LEAVING` the oldest of the user or target with the most leave earlier.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::message::Origin;

use super::error::MintError;
use super::grant::{Grant, Holder, Terms, View};
use super::index::TokenIndex;
use super::leaving::Leaving;
use crate::core::limits::{MAX_KVMI_PER_TARGET, MAX_OPERATOR};
use crate::core::quota::{Bound, Quota};

/// The grants of all targets.
#[derive(Clone, Debug)]
pub(crate) struct Grants {
    pub(super) grants: BTreeMap<u64, Grant>,
    pub(super) views: BTreeMap<u64, View>,
    pub(super) tokens: TokenIndex,
    /// When usable grants expire.
    pub(super) expiring: BTreeSet<(Instant, u64)>,
    /// When grants that are of no use any more leave the table.
    pub(super) leaving: Leaving,
    /// Usable tokens of KVMI's for each target.
    pub(super) outstanding: BTreeMap<u64, usize>,
    /// Grants of operators that are not leaving.
    pub(super) operator: Quota,
    /// Targets and their grants.
    pub(super) of_target: BTreeSet<(u64, u64)>,
    /// Connections and the grants whose tokens they hold or have used for pages.
    pub(super) of_peer: BTreeSet<(u64, u64)>,
    pub(super) views_of_peer: BTreeMap<u64, BTreeSet<u64>>,
    pub(super) last_grant: u64,
    pub(super) last_view: u64,
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
    pub(in crate::core) fn contains(&self, id: u64) -> bool {
        self.grants.contains_key(&id)
    }

    /// How often a grant's token may still be used.
    #[cfg(test)]
    pub(in crate::core) fn uses_left(&self, id: u64) -> u32 {
        self.grants[&id].uses_left
    }

    /// Whether nothing is in the table.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == (0, 0)
    }
}

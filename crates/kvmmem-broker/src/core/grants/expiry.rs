// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Removal of closed views and expired grants, and the indexes and limits that follow from it.

use std::time::Instant;

use kvmmem_proto::message::{GrantState, Origin};

use super::grant::{Grant, View};
use super::table::Grants;
use crate::core::limits::KEPT;

impl Grants {
    /// Takes a view out of the table.
    pub(super) fn close(&mut self, now: Instant, view: u64) -> Option<View> {
        let view = self.views.remove(&view)?;
        if let Some(views) = self.views_of_peer.get_mut(&view.peer) {
            views.remove(&view.id);
            if views.is_empty() {
                self.views_of_peer.remove(&view.peer);
            }
        }
        if let Some(grant) = self.grants.get_mut(&view.grant) {
            grant.views.remove(&view.id);
            self.settle(now, view.grant);
        }
        Some(view)
    }

    /// Takes a grant out of the table, with its views.
    pub(super) fn remove(&mut self, id: u64) -> Vec<View> {
        let Some(mut grant) = self.grants.remove(&id) else { return Vec::new() };
        self.expiring.remove(&(grant.expires, id));
        if let Some(until) = grant.leaves {
            self.leaving.remove(&grant.terms, until, id);
        }
        if let Some(token) = grant.token.take() {
            self.tokens.remove(&token, id);
        }
        self.uncount(&mut grant);
        self.of_target.remove(&(grant.terms.target, id));
        for peer in grant.peers() {
            self.of_peer.remove(&(peer, id));
        }
        let ended =
            grant.views.iter().filter_map(|view| self.views.remove(view)).collect::<Vec<_>>();
        for view in &ended {
            if let Some(views) = self.views_of_peer.get_mut(&view.peer) {
                views.remove(&view.id);
                if views.is_empty() {
                    self.views_of_peer.remove(&view.peer);
                }
            }
        }
        ended
    }

    /// Lets time pass.
    pub(super) fn advance(&mut self, now: Instant) {
        while let Some((at, id)) = self.expiring.first().copied().filter(|(at, _)| *at <= now) {
            self.expiring.remove(&(at, id));
            self.settle(at, id);
        }
        while let Some(id) = self.leaving.due(now) {
            self.remove(id);
        }
    }

    /// Brings the indexes up to what a grant is now.
    pub(super) fn settle(&mut self, now: Instant, id: u64) {
        // Nothing changes in the indexes for a grant that can be used.
        if self.is_active(now, id) {
            return;
        }
        let Some(mut grant) = self.grants.remove(&id) else { return };
        self.expiring.remove(&(grant.expires, id));
        self.uncount_kvmi(&mut grant);
        // An expired token may still be told as used, and a use may be returned; any other is of no
        // use.
        let is_useless = match grant.state(now) {
            GrantState::Active | GrantState::Expired => false,
            GrantState::Spent => !grant.may_be_returned(),
            GrantState::Revoked => true,
        };
        if is_useless && let Some(token) = grant.token.take() {
            self.tokens.remove(&token, id);
        }
        if !grant.is_in_use() && grant.leaves.is_none() {
            self.uncount(&mut grant);
            if let Some(until) = now.checked_add(KEPT) {
                grant.leaves = Some(until);
                self.leaving.insert(&grant.terms, until, id);
            }
        }
        self.grants.insert(id, grant);
    }

    /// Ends a grant's share of `MAX_KVMI_PER_TARGET`.
    fn uncount_kvmi(&mut self, grant: &mut Grant) {
        if grant.terms.origin == Origin::Kvmi && std::mem::take(&mut grant.is_counted) {
            let target = grant.terms.target;
            if let Some(count) = self.outstanding.get_mut(&target) {
                *count -= 1;
                if *count == 0 {
                    self.outstanding.remove(&target);
                }
            }
        }
    }

    /// Ends a grant's share of all limits.
    fn uncount(&mut self, grant: &mut Grant) {
        self.uncount_kvmi(grant);
        if grant.terms.origin == Origin::Operator && std::mem::take(&mut grant.is_counted) {
            self.operator.give_back(grant.terms.by.uid);
        }
    }
}

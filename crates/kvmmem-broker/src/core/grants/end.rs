// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How grants and views end: revoked, or with their target or connection.

use std::collections::BTreeSet;
use std::time::Instant;

use super::grant::{Holder, View};
use super::table::Grants;

/// What a revocation affects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RevokedGrant {
    /// Number of the target.
    pub target: u64,
    /// Connections that have a view by it, have mapped a page by it, or hold its token.
    pub peers: BTreeSet<u64>,
    /// Views that are open.
    pub views: usize,
}

impl Grants {
    /// Revokes a grant: its token opens nothing from now on. What it has opened is listed until its
    /// peers confirm that they have released it.
    pub(crate) fn revoke(&mut self, now: Instant, id: u64) -> Option<RevokedGrant> {
        self.advance(now);
        let grant = self.grants.get_mut(&id)?;
        grant.revoked = true;
        let (target, views) = (grant.terms.target, grant.views.len());
        let peers = self.peers_of(id);
        self.settle(now, id);
        Some(RevokedGrant { target, peers, views })
    }

    /// The connections that have a view by a grant, have mapped a page by it, or hold its token.
    pub(crate) fn peers_of(&self, id: u64) -> BTreeSet<u64> {
        let Some(grant) = self.grants.get(&id) else { return BTreeSet::new() };
        let mut peers = grant.peers();
        peers.extend(
            grant.views.iter().filter_map(|view| self.views.get(view)).map(|view| view.peer),
        );
        peers
    }

    /// Records that a peer has released everything it held under a revoked grant. Returns the views
    /// that this closes.
    pub(crate) fn confirm(&mut self, now: Instant, id: u64, by: u64) -> Vec<View> {
        let Some(grant) = self.grants.get_mut(&id).filter(|grant| grant.revoked) else {
            return Vec::new();
        };
        grant.users.remove(&by);
        if grant.terms.holder == Holder::Pushed(by) {
            grant.terms.holder = Holder::Anybody;
        }
        self.of_peer.remove(&(by, id));
        let ended = self.close_all(now, id, by);
        self.settle(now, id);
        ended
    }

    /// Closes the views that a connection has by a grant.
    fn close_all(&mut self, now: Instant, id: u64, by: u64) -> Vec<View> {
        let Some(grant) = self.grants.get(&id) else { return Vec::new() };
        let is_theirs = |view: &&u64| self.views.get(view).is_some_and(|view| view.peer == by);
        let views: Vec<u64> = grant.views.iter().filter(is_theirs).copied().collect();
        views.into_iter().filter_map(|view| self.close(now, view)).collect()
    }

    /// Takes out what there is for a target that is gone; returns the views that end by it.
    pub(crate) fn forget_target(&mut self, target: u64) -> Vec<View> {
        let ids: Vec<u64> = of(&self.of_target, target).collect();
        ids.into_iter().flat_map(|id| self.remove(id)).collect()
    }

    /// Takes out what a connection has that has ended; returns the views that end by it.
    pub(crate) fn forget_peer(&mut self, now: Instant, peer: u64) -> Vec<View> {
        let views = self.views_of_peer.remove(&peer).unwrap_or_default();
        let mut ended: Vec<View> =
            views.into_iter().filter_map(|view| self.close(now, view)).collect();
        let ids: Vec<u64> = of(&self.of_peer, peer).collect();
        for id in ids {
            let Some(grant) = self.grants.get_mut(&id) else { continue };
            if grant.terms.holder == Holder::Pushed(peer) && grant.views.is_empty() {
                ended.extend(self.remove(id));
            } else if grant.users.remove(&peer).is_some() {
                self.of_peer.remove(&(peer, id));
                self.settle(now, id);
            }
        }
        ended
    }
}

/// The grants of a target or of a connection.
fn of(index: &BTreeSet<(u64, u64)>, number: u64) -> impl Iterator<Item = u64> {
    index.range((number, 0)..=(number, u64::MAX)).map(|(_, id)| *id)
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker decides: grants, views, policies and revocations, as plain data.
//!
//! No module here does I/O, reads a clock, starts a thread or takes a lock. The broker keeps one
//! [`Core`] under one lock and never holds that lock over a system call. [`model`] explores every
//! order of the operations with a few peers.

pub(crate) mod grants;
#[cfg(test)]
mod model;
pub(crate) mod policy;
pub mod quota;
pub(crate) mod revocation;
pub(crate) mod role;

use std::time::Instant;

use kvmmem_proto::message::ViewCounters;

use grants::{Grants, View};
use policy::Policies;
use quota::Limits;
use revocation::{Revocation, Revocations};

/// The broker's state, without files, sockets and threads.
#[derive(Clone, Debug)]
pub(crate) struct Core {
    pub(crate) grants: Grants,
    pub(crate) policies: Policies,
    revocations: Revocations,
}

impl Core {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            grants: Grants::new(limits.grants),
            policies: Policies::new(limits.policies),
            revocations: Revocations::default(),
        }
    }

    /// Revokes a grant: its token opens nothing any more. Each peer of the revocation has to be
    /// told, and confirms with [`Self::confirm`].
    pub(crate) fn revoke(&mut self, now: Instant, grant: u64) -> Option<Revocation> {
        let affected = self.grants.revoke(now, grant)?;
        Some(self.revocations.begin(grant, affected))
    }

    /// Whether a revocation waits for no peer any more.
    pub(crate) fn is_revoked(&self, number: u64) -> bool {
        self.revocations.is_done(number)
    }

    /// Ends a revocation, done or not; returns how many peers have not confirmed.
    pub(crate) fn end_revocation(&mut self, number: u64) -> usize {
        self.revocations.end(number)
    }

    /// Records that a peer has released everything it held under a revoked grant. Returns the views
    /// this closes.
    pub(crate) fn confirm(&mut self, now: Instant, grant: u64, peer: u64) -> Vec<View> {
        self.revocations.confirm(grant, peer);
        self.grants.confirm(now, grant, peer)
    }

    /// Begins to close a view: it reaches no memory any more. The caller waits for the copies that
    /// are under way, and calls [`Self::close_view`] then. Returns whether the peer has the view.
    pub(crate) fn begin_close(&mut self, view: u64, peer: u64, counters: ViewCounters) -> bool {
        self.grants.count(view, peer, counters) && self.grants.begin_close(view, peer)
    }

    /// Closes a view. A peer that holds nothing else under the grant need not confirm its
    /// revocation.
    pub(crate) fn close_view(&mut self, now: Instant, view: u64, peer: u64) -> Option<View> {
        let closed = self.grants.detach(now, view, peer)?;
        if !self.grants.peers_of(closed.grant).contains(&peer) {
            self.revocations.confirm(closed.grant, peer);
        }
        Some(closed)
    }

    /// Removes what a peer held whose connection has ended. Returns the views this closes.
    pub(crate) fn peer_lost(&mut self, now: Instant, peer: u64) -> Vec<View> {
        self.revocations.peer_lost(peer);
        self.grants.forget_peer(now, peer)
    }

    /// Removes the grants of a target that is gone. Returns the views this closes. A revocation
    /// still waits: the target's end unmaps nothing in its peers.
    pub(crate) fn target_gone(&mut self, target: u64) -> Vec<View> {
        self.grants.forget_target(target)
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.grants.is_empty() && self.revocations.waiting().next().is_none()
    }
}

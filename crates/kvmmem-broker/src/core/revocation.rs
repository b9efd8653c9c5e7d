// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Revocations that wait for confirmations.
//!
//! A revocation waits for each peer that held something under the grant when it was revoked. A peer
//! leaves that set when it confirms, when it closes the last it held, or when its connection ends;
//! the last counts as unconfirmed. The broker ends a revocation when the set is empty or its time
//! is up. Revocations of one grant are independent of each other.

use std::collections::{BTreeMap, BTreeSet};

use super::grants::RevokedGrant;

/// A revocation that has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Revocation {
    pub(crate) number: u64,
    pub(crate) target: u64,
    /// The peers to notify.
    pub(crate) peers: BTreeSet<u64>,
    /// How many views were open.
    pub(crate) views: usize,
}

/// The revocations that have begun and not ended, by number.
#[derive(Clone, Debug, Default)]
pub(super) struct Revocations {
    pending: BTreeMap<u64, PendingRevocation>,
    last: u64,
}

#[derive(Clone, Debug)]
struct PendingRevocation {
    grant: u64,
    peers: BTreeSet<u64>,
    /// Peers whose connection has ended without a confirmation.
    lost: usize,
}

impl Revocations {
    pub(super) fn begin(&mut self, grant: u64, affected: RevokedGrant) -> Revocation {
        let RevokedGrant { target, peers, views } = affected;
        self.last += 1;
        self.pending.insert(self.last, PendingRevocation { grant, peers: peers.clone(), lost: 0 });
        Revocation { number: self.last, target, peers, views }
    }

    pub(super) fn is_done(&self, number: u64) -> bool {
        self.pending.get(&number).is_none_or(|one| one.peers.is_empty())
    }

    /// Ends a revocation; returns how many peers have not confirmed.
    pub(super) fn end(&mut self, number: u64) -> usize {
        self.pending.remove(&number).map_or(0, |one| one.peers.len() + one.lost)
    }

    pub(super) fn confirm(&mut self, grant: u64, peer: u64) {
        for one in self.pending.values_mut().filter(|one| one.grant == grant) {
            one.peers.remove(&peer);
        }
    }

    pub(super) fn peer_lost(&mut self, peer: u64) {
        for one in self.pending.values_mut() {
            one.lost += usize::from(one.peers.remove(&peer));
        }
    }

    #[cfg(test)]
    pub(super) fn pending(&self) -> impl Iterator<Item = (u64, u64, &BTreeSet<u64>)> {
        self.pending.iter().map(|(number, one)| (*number, one.grant, &one.peers))
    }
}

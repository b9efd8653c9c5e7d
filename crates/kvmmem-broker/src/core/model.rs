// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Explores every order of grant, attach, revoke, confirm, lost peer and gone target, with the core
//! itself as the state.
//!
//! The model adds what the core does not see: the memory that each peer has mapped, and the
//! revocations that it was told of and has not confirmed. Two states are one where all that they
//! consist of is equal, ids included.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::{self, Write};
use std::hash::Hasher;
use std::time::Instant;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Caller, Origin, ViewCounters};
use kvmmem_proto::scope::{Rights, Scope};

use super::Core;
use super::grants::{Holder, KVMI_LIFETIME, Terms, User};
use super::quota::Limits;
use super::revocation::Revocation;

/// How much of everything there may be.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    peers: u64,
    targets: u64,
    grants: u64,
    /// Uses of each grant's token.
    uses: u32,
    revocations: u64,
}

#[derive(Clone, Debug)]
struct State {
    core: Core,
    /// Those that are connected.
    peers: BTreeMap<u64, Peer>,
    /// Those that are registered.
    targets: BTreeSet<u64>,
    granted: u64,
    /// By number, those that have not returned.
    revoking: BTreeMap<u64, u64>,
    revoked: u64,
    /// Grants of which a revocation has returned with every peer's confirmation.
    confirmed: BTreeSet<u64>,
}

/// What a peer knows and has, by its own account.
#[derive(Clone, Debug, Default, PartialEq)]
struct Peer {
    /// Its views, with their grants.
    views: BTreeMap<u64, u64>,
    /// Views that it has closed, and whose copies the broker still waits for.
    closing: BTreeMap<u64, u64>,
    /// Grants by which it has mapped a page.
    pages: BTreeSet<u64>,
    /// Revocations that it was told of and has not confirmed.
    told: BTreeSet<u64>,
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Grant {
        target: u64,
    },
    Attach {
        peer: u64,
        grant: u64,
    },
    MapPage {
        peer: u64,
        grant: u64,
    },
    BeginClose {
        peer: u64,
        view: u64,
    },
    Close {
        peer: u64,
        view: u64,
    },
    Revoke {
        grant: u64,
    },
    Confirm {
        peer: u64,
        grant: u64,
    },
    /// The time of a revocation that may wait is up, or it is done.
    Return {
        revocation: u64,
    },
    PeerLost {
        peer: u64,
    },
    TargetGone {
        target: u64,
    },
}

impl State {
    fn new(bounds: Bounds) -> Self {
        Self {
            core: Core::new(&Limits::default()),
            peers: (1..=bounds.peers).map(|peer| (peer, Peer::default())).collect(),
            targets: (1..=bounds.targets).collect(),
            granted: 0,
            revoking: BTreeMap::new(),
            revoked: 0,
            confirmed: BTreeSet::new(),
        }
    }

    fn actions(&self, bounds: Bounds) -> Vec<Action> {
        let mut actions = Vec::new();
        let grants = 1..=self.granted;
        if self.granted < bounds.grants {
            actions.extend(self.targets.iter().map(|&target| Action::Grant { target }));
        }
        // Peers that hold nothing are alike: it is enough if the first of them acts.
        let idle = self.peers.iter().find(|(_, its)| **its == Peer::default());
        let busy = self.peers.iter().filter(|(_, its)| **its != Peer::default());
        for (&peer, its) in busy.chain(idle) {
            actions.extend(grants.clone().map(|grant| Action::Attach { peer, grant }));
            actions.extend(grants.clone().map(|grant| Action::MapPage { peer, grant }));
            actions.extend(its.views.keys().map(|&view| Action::BeginClose { peer, view }));
            actions.extend(its.closing.keys().map(|&view| Action::Close { peer, view }));
            actions.extend(its.told.iter().map(|&grant| Action::Confirm { peer, grant }));
            actions.push(Action::PeerLost { peer });
        }
        if self.revoked < bounds.revocations {
            actions.extend(grants.map(|grant| Action::Revoke { grant }));
        }
        actions.extend(self.revoking.keys().map(|&revocation| Action::Return { revocation }));
        actions.extend(self.targets.iter().map(|&target| Action::TargetGone { target }));
        actions
    }

    /// The state after an action; `None` where the core refuses it.
    fn after(&self, action: Action, now: Instant, bounds: Bounds) -> Option<Self> {
        let mut state = self.clone();
        let core = &mut state.core;
        match action {
            Action::Grant { target } => {
                state.granted =
                    core.grants.mint(now, token(self.granted + 1), terms(target, bounds)).unwrap();
            }
            Action::Attach { peer, grant } => {
                let caller = Caller { pid: 1, uid: 1, comm: String::new() };
                let opened =
                    core.grants.attach(now, &token(grant), user(peer), ("host", caller), false);
                let (view, opened) = opened.ok()?;
                assert_eq!(opened.grant, grant);
                state.peers.get_mut(&peer)?.views.insert(view, grant);
            }
            Action::MapPage { peer, grant } => {
                core.grants.redeem(now, &token(grant), user(peer)).ok()?;
                state.peers.get_mut(&peer)?.pages.insert(grant);
            }
            Action::BeginClose { peer, view } => {
                // A view whose target is gone is not the peer's any more.
                core.begin_close(view, peer, ViewCounters::default());
                let its = state.peers.get_mut(&peer)?;
                let grant = its.views.remove(&view)?;
                its.closing.insert(view, grant);
            }
            Action::Close { peer, view } => {
                core.close_view(now, view, peer);
                state.peers.get_mut(&peer)?.closing.remove(&view);
            }
            Action::Revoke { grant } => {
                let Revocation { number, peers, .. } = core.revoke(now, grant)?;
                for peer in peers {
                    state.peers.get_mut(&peer).expect("it is connected").told.insert(grant);
                }
                state.revoking.insert(number, grant);
                state.revoked += 1;
            }
            Action::Confirm { peer, grant } => {
                let its = state.peers.get_mut(&peer)?;
                its.told.remove(&grant);
                its.views.retain(|_, of| *of != grant);
                its.closing.retain(|_, of| *of != grant);
                its.pages.remove(&grant);
                core.confirm(now, grant, peer);
            }
            Action::Return { revocation } => {
                let is_done = core.is_revoked(revocation);
                let unconfirmed = core.end_revocation(revocation);
                let grant = state.revoking.remove(&revocation)?;
                assert!(is_done || unconfirmed > 0);
                if unconfirmed == 0 {
                    state.confirmed.insert(grant);
                }
            }
            Action::PeerLost { peer } => {
                core.peer_lost(now, peer);
                state.peers.remove(&peer);
            }
            Action::TargetGone { target } => {
                core.target_gone(target);
                state.targets.remove(&target);
            }
        }
        Some(state)
    }

    fn check(&self) {
        for (&peer, its) in &self.peers {
            let holds = its.holds();
            // A view is not open once a revocation of its grant has returned confirmed.
            assert!(holds.is_disjoint(&self.confirmed), "peer {peer}: {self:?}");
            // A peer that holds memory of a target that is there is known to the core.
            for grant in holds.iter().filter(|grant| self.core.grants.contains(**grant)) {
                assert!(self.core.grants.peers_of(*grant).contains(&peer), "peer {peer}: {self:?}");
            }
        }
        // The core remembers no peer for longer.
        for grant in 1..=self.granted {
            for peer in self.core.grants.peers_of(grant) {
                assert!(self.peers.get(&peer).is_some_and(|its| its.holds().contains(&grant)));
            }
        }
        // Each revocation can end: it waits for peers that are there, and have to confirm it or to
        // close what they have.
        for (number, grant, peers) in self.core.revocations.waiting() {
            assert!(self.revoking.get(&number) == Some(&grant));
            for peer in peers {
                let its = self.peers.get(peer);
                assert!(its.is_some_and(|its| its.told.contains(&grant)), "{number}: {self:?}");
            }
        }
        if self.peers.is_empty() && self.targets.is_empty() && self.revoking.is_empty() {
            assert!(self.core.is_empty(), "{self:?}");
        }
    }

    fn digest(&self) -> u64 {
        struct Digest(DefaultHasher);
        impl Write for Digest {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                self.0.write(text.as_bytes());
                Ok(())
            }
        }
        let mut digest = Digest(DefaultHasher::new());
        write!(digest, "{self:?}").unwrap();
        digest.0.finish()
    }
}

impl Peer {
    /// The grants under which it holds something.
    fn holds(&self) -> BTreeSet<u64> {
        self.views.values().chain(self.closing.values()).chain(&self.pages).copied().collect()
    }
}

fn token(grant: u64) -> Token {
    Token::new([grant, 0, 0, 7])
}

fn user(peer: u64) -> User {
    User { peer, vm: None, uuid: None }
}

fn terms(target: u64, bounds: Bounds) -> Terms {
    Terms {
        target,
        scope: Scope::whole(Rights::ReadWrite),
        lifetime: KVMI_LIFETIME,
        uses: bounds.uses,
        holder: Holder::Anybody,
        label: None,
        origin: Origin::Operator,
        by: Credentials { pid: 1, uid: 0 },
    }
}

/// Visits every state that can be reached, and returns how many there are.
fn explore(bounds: Bounds) -> usize {
    let now = Instant::now();
    let first = State::new(bounds);
    let mut seen = HashSet::from([first.digest()]);
    let mut open = vec![first];
    while let Some(state) = open.pop() {
        state.check();
        for action in state.actions(bounds) {
            if let Some(next) = state.after(action, now, bounds)
                && seen.insert(next.digest())
            {
                open.push(next);
            }
        }
    }
    seen.len()
}

#[test]
fn three_peers_and_one_grant_keep_every_promise() {
    let bounds = Bounds { peers: 3, targets: 1, grants: 1, uses: 2, revocations: 1 };
    assert!(explore(bounds) > 1_000);
}

#[test]
#[ignore = "takes minutes; `cargo xtask model` runs it"]
fn three_peers_and_two_grants_keep_every_promise() {
    let one = Bounds { peers: 3, targets: 1, grants: 1, uses: 3, revocations: 2 };
    let two = Bounds { peers: 3, targets: 2, grants: 2, uses: 1, revocations: 2 };
    for bounds in [one, two] {
        println!("{} states with {bounds:?}", explore(bounds));
    }
}

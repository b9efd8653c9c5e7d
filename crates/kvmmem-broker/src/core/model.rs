// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Explores every order of grant, attach, revoke, confirm, lost peer and gone target, with the core
//! itself as the state.
//!
//! The model adds what the core does not see: the memory that each peer has mapped, and what it was
//! told. Peer 1 is the VMM of an introspector, the others are processes of the host. Two states are
//! one where all that they consist of is equal, ids included.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::fmt::{self, Write};
use std::hash::Hasher;
use std::sync::Arc;
use std::time::Instant;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::map::{MemoryMap, Region};
use kvmmem_proto::message::{Call, Caller, GrantRequest, Unusable, ViewCounters, VmIdentity};

use super::call::{Means, Reply};
use super::effect::{Effect, Push};
use super::layout::Layout;
use super::limits::Limits;
use super::machine::Core;
use super::vms::NewVm;
use crate::test_peer::{grant_request, identity};

/// The connection of an operator, which grants and revokes.
const OPERATOR: u64 = 0;

/// The connection of the introspector's VMM.
const VMM: u64 = 1;

/// Stands for the VMMs of targets, which have no part in this.
const TARGETS: u64 = 100;

const ROOT: Credentials = Credentials { pid: 1, uid: 0 };

/// How much of everything there may be.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    peers: u64,
    targets: u64,
    grants: u64,
    /// Uses of each grant's token.
    uses: u32,
    revocations: u64,
    /// How often files do not arrive.
    losses: u64,
}

#[derive(Clone, Debug)]
struct State {
    core: Core,
    /// Those that are connected.
    peers: BTreeMap<u64, Peer>,
    /// Targets that are registered.
    targets: BTreeSet<u64>,
    introspector: u64,
    granted: u64,
    /// By number, those that have not returned.
    revoking: BTreeMap<u64, u64>,
    revoked: u64,
    losses: u64,
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
    /// Targets that it was told of, with their files.
    known: BTreeSet<u64>,
    /// Targets that it was told of and whose files did not arrive, with the introductions' numbers.
    lost: BTreeMap<u64, u64>,
    /// Targets whose end it was told of.
    gone: BTreeSet<u64>,
    /// What it cannot use for want of files. The broker is told late, in this order.
    unusable: VecDeque<FailedDelivery>,
}

/// Something that was opened and cannot be used, and the introduction whose files did not arrive.
#[derive(Clone, Copy, Debug, PartialEq)]
struct FailedDelivery {
    target: u64,
    introduction: u64,
    grant: u64,
    unusable: Unusable,
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Grant {
        target: u64,
    },
    Attach {
        peer: u64,
        grant: u64,
        has_descriptors: bool,
    },
    /// The introspector's v1 tool uses a token.
    MapPage {
        grant: u64,
        has_descriptors: bool,
    },
    /// The broker is told what the introspector's VMM could not use for want of files.
    Unreceived,
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
        let mut core = Core::new(&Limits::default());
        let peers = (1..=bounds.peers).map(|peer| (peer, Peer::default())).collect();
        core.peer_joined(OPERATOR, ROOT);
        (1..=bounds.peers).for_each(|peer| core.peer_joined(peer, ROOT));
        let mut register = |identity: VmIdentity, peer| {
            let layout = identity.introspectable.then(layout);
            let identity = Arc::new(identity);
            core.register(NewVm { identity, layout, peer, vmm: ROOT, by: ROOT }).unwrap()
        };
        let target = |number: u64| VmIdentity {
            introspectable: true,
            ..identity(&format!("target-{number}"))
        };
        let targets =
            (1..=bounds.targets).map(|number| register(target(number), TARGETS)).collect();
        let lion = VmIdentity { introspector: true, ..identity("lion") };
        let introspector = register(lion, VMM);
        let (revoking, confirmed) = (BTreeMap::new(), BTreeSet::new());
        Self {
            core,
            peers,
            targets,
            introspector,
            granted: 0,
            revoking,
            revoked: 0,
            losses: 0,
            confirmed,
        }
    }

    fn actions(&self, bounds: Bounds) -> Vec<Action> {
        let mut actions = Vec::new();
        let grants = 1..=self.granted;
        if self.granted < bounds.grants {
            actions.extend(self.targets.iter().map(|&target| Action::Grant { target }));
        }
        // Processes of the host that hold nothing are alike: it is enough if the first of them
        // acts.
        let is_idle = |peer: u64, its: &Peer| peer != VMM && *its == Peer::default();
        let idle = self.peers.iter().find(|(peer, its)| is_idle(**peer, its));
        let busy = self.peers.iter().filter(|(peer, its)| !is_idle(**peer, its));
        for (&peer, its) in busy.chain(idle) {
            let attach = |has_descriptors| {
                grants.clone().map(move |grant| Action::Attach { peer, grant, has_descriptors })
            };
            let map_page = |has_descriptors| {
                grants.clone().map(move |grant| Action::MapPage { grant, has_descriptors })
            };
            actions.extend(attach(true));
            if peer == VMM {
                actions.extend(map_page(true));
                if self.losses < bounds.losses {
                    actions.extend(attach(false).chain(map_page(false)));
                }
                actions.extend(its.unusable.front().map(|_| Action::Unreceived));
            }
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
        state.act(action, now, bounds)?;
        state.deliver(true);
        Some(state)
    }

    fn act(&mut self, action: Action, now: Instant, bounds: Bounds) -> Option<()> {
        match action {
            Action::Grant { target } => {
                self.granted += 1;
                let means = Means { token: Some(token(self.granted)), may_get_files: false };
                let uses = bounds.uses;
                let request = GrantRequest { uses, ..grant_request(&format!("target-{target}")) };
                let reply = self.core.handle(now, OPERATOR, Call::Grant(request), &means).unwrap();
                assert!(
                    matches!(reply, Reply::Granted { opened, .. } if opened.grant == self.granted)
                );
            }
            Action::Attach { peer, grant, has_descriptors } => {
                let caller = Caller { pid: 1, uid: 1, comm: String::new() };
                let token = token(grant);
                let call = Call::Attach { token, caller, read_only: true, reaching: vec![] };
                let Reply::Attached(attached) = self.give(now, peer, call)? else { unreachable!() };
                assert_eq!(attached.opened.grant, grant);
                self.deliver(has_descriptors);
                let (view, target) = (attached.view, attached.opened.target);
                if self.can_use(peer, target, grant, Unusable::View(view))? {
                    self.peers.get_mut(&peer)?.views.insert(view, grant);
                }
            }
            Action::MapPage { grant, has_descriptors } => {
                let reply = self.give(now, VMM, Call::Redeem { token: token(grant) })?;
                let Reply::Redeemed(opened) = reply else { unreachable!() };
                self.deliver(has_descriptors);
                if self.can_use(VMM, opened.target, grant, Unusable::Token(grant))? {
                    self.peers.get_mut(&VMM)?.pages.insert(grant);
                }
            }
            Action::Unreceived => {
                let lost = self.peers.get_mut(&VMM)?.unusable.pop_front()?;
                let FailedDelivery { target, introduction, grant, unusable } = lost;
                // It is over where the grant has ended, or its revocation was confirmed.
                let is_there = self.core.grants.peers_of(grant).contains(&VMM);
                let uses = |core: &Core| is_there.then(|| core.grants.uses_left(grant));
                let before = uses(&self.core);
                let call = Call::Unreceived { target, introduction, unusable };
                match self.core.handle(now, VMM, call, &NONE) {
                    Ok(Reply::Undoing { view }) => self.core.undo_view(now, view, VMM),
                    reply => assert!(matches!(reply, Ok(Reply::Nothing)), "{reply:?}"),
                }
                assert_eq!(uses(&self.core), before.map(|uses| uses + 1));
            }
            Action::BeginClose { peer, view } => {
                let counters = ViewCounters::default();
                // It is refused where the view has ended with its target.
                let _ = self.core.handle(now, peer, Call::Detached { view, counters }, &NONE);
                let its = self.peers.get_mut(&peer)?;
                let grant = its.views.remove(&view)?;
                its.closing.insert(view, grant);
            }
            Action::Close { peer, view } => {
                self.core.close_view(now, view, peer);
                self.peers.get_mut(&peer)?.closing.remove(&view);
            }
            Action::Revoke { grant } => {
                let reply = self.core.handle(now, OPERATOR, Call::Revoke { grant }, &NONE).ok()?;
                let Reply::Revoking { revocation, .. } = reply else { unreachable!() };
                self.revoking.insert(revocation.number, grant);
                self.revoked += 1;
            }
            Action::Confirm { peer, grant } => {
                let its = self.peers.get_mut(&peer)?;
                its.told.remove(&grant);
                its.views.retain(|_, of| *of != grant);
                its.closing.retain(|_, of| *of != grant);
                its.pages.remove(&grant);
                let reply = self.core.handle(now, peer, Call::RevokedDone { grant }, &NONE);
                assert!(matches!(reply, Ok(Reply::Confirming { .. })));
                self.core.confirm(now, grant, peer);
            }
            Action::Return { revocation } => {
                let is_done = self.core.is_revoked(revocation);
                let unconfirmed = self.core.end_revocation(revocation);
                let grant = self.revoking.remove(&revocation)?;
                assert!(is_done || unconfirmed > 0);
                if unconfirmed == 0 {
                    self.confirmed.insert(grant);
                }
            }
            Action::PeerLost { peer } => {
                if peer == VMM {
                    assert!(self.core.vm_gone(self.introspector));
                }
                self.core.peer_lost(now, peer);
                self.peers.remove(&peer);
            }
            Action::TargetGone { target } => {
                assert!(self.core.vm_gone(target));
                self.targets.remove(&target);
            }
        }
        Some(())
    }

    /// A call that may send files: where the peer has not read what was sent before, nothing
    /// changes.
    fn give(&mut self, now: Instant, peer: u64, call: Call) -> Option<Reply> {
        let means = Means { token: None, may_get_files: true };
        let before = self.core.grants.len();
        match self.core.handle(now, peer, call, &NONE).ok()? {
            Reply::Unread(call) => {
                assert_eq!(self.core.grants.len(), before);
                self.core.handle(now, peer, call, &means).ok()
            }
            reply => Some(reply),
        }
    }

    /// Whether a peer has the files of the target that it has opened something of; it is going to
    /// tell the broker where it has not.
    fn can_use(&mut self, peer: u64, target: u64, grant: u64, unusable: Unusable) -> Option<bool> {
        let its = self.peers.get_mut(&peer)?;
        let Some(&introduction) = its.lost.get(&target) else { return Some(true) };
        its.unusable.push_back(FailedDelivery { target, introduction, grant, unusable });
        Some(false)
    }

    /// The peers read what they were sent; without descriptors, a target's files do not arrive.
    fn deliver(&mut self, has_descriptors: bool) {
        for effect in self.core.take_effects() {
            let Effect::Push { peer, push } = effect else { continue };
            let its = self.peers.get_mut(&peer).expect("it is connected");
            match push {
                Push::Revoke { grant } => {
                    its.told.insert(grant);
                }
                Push::Target { target, introduction, .. } => {
                    assert!(self.targets.contains(&target) && !its.gone.contains(&target));
                    assert!(peer == VMM && !its.known.contains(&target));
                    if has_descriptors {
                        its.lost.remove(&target);
                        its.known.insert(target);
                    } else {
                        self.losses += 1;
                        its.lost.insert(target, introduction);
                    }
                }
                Push::Gone { target } => {
                    let is_told = its.known.contains(&target) || its.lost.contains_key(&target);
                    assert!(peer != VMM || is_told);
                    assert!(its.gone.insert(target));
                    its.lost.remove(&target);
                }
                Push::Granted { .. } | Push::Changed { .. } => unreachable!(),
            }
        }
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
                let its = self.peers.get(&peer).map(|its| (its.holds(), &its.unusable));
                assert!(its.is_some_and(|(holds, unusable)| {
                    holds.contains(&grant) || unusable.iter().any(|lost| lost.grant == grant)
                }));
            }
        }
        // Each revocation can end: it waits for peers that are there, and have to confirm it or to
        // close what they have.
        for (number, grant, peers) in self.core.revocations.pending() {
            assert!(self.revoking.get(&number) == Some(&grant));
            for peer in peers {
                let its = self.peers.get(peer);
                assert!(its.is_some_and(|its| its.told.contains(&grant)), "{number}: {self:?}");
            }
        }
        for (peer, its) in &self.peers {
            // A peer that was told of a target is told of its end.
            for target in its.known.difference(&its.gone) {
                assert!(self.targets.contains(target), "peer {peer}: {self:?}");
            }
        }
        if self.peers.is_empty() && self.targets.is_empty() && self.revoking.is_empty() {
            let mut core = self.core.clone();
            core.peer_lost(Instant::now(), OPERATOR);
            assert!(core.is_empty(), "{self:?}");
        }
    }
}

fn digest(state: &impl fmt::Debug) -> u64 {
    struct Digest(DefaultHasher);
    impl Write for Digest {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0.write(text.as_bytes());
            Ok(())
        }
    }
    let mut digest = Digest(DefaultHasher::new());
    write!(digest, "{state:?}").unwrap();
    digest.0.finish()
}

const NONE: Means = Means { token: None, may_get_files: false };

impl Peer {
    /// The grants under which it holds something.
    fn holds(&self) -> BTreeSet<u64> {
        self.views.values().chain(self.closing.values()).chain(&self.pages).copied().collect()
    }
}

fn token(grant: u64) -> Token {
    Token::new([grant, 0, 0, 7])
}

fn layout() -> Arc<Layout> {
    let map = MemoryMap::new(vec![Region { gpa: 0, len: 0x1000, offset: 0, file: 0 }]).unwrap();
    Arc::new(Layout { generation: 1, map, is_private: false })
}

/// Visits every state that can be reached, and returns how many there are.
fn explore(bounds: Bounds) -> usize {
    let now = Instant::now();
    let first = State::new(bounds);
    let mut seen = HashSet::from([digest(&first)]);
    let mut open = vec![first];
    while let Some(state) = open.pop() {
        state.check();
        for action in state.actions(bounds) {
            if let Some(next) = state.after(action, now, bounds)
                && seen.insert(digest(&next))
            {
                open.push(next);
            }
        }
    }
    seen.len()
}

#[test]
fn three_peers_and_one_grant_keep_every_promise() {
    let bounds = Bounds { peers: 3, targets: 1, grants: 1, uses: 2, revocations: 1, losses: 1 };
    assert!(explore(bounds) > 1_000);
}

#[test]
#[ignore = "takes a minute in a release build; `cargo xtask model` runs it"]
fn three_peers_and_two_grants_keep_every_promise() {
    let one = Bounds { peers: 3, targets: 1, grants: 1, uses: 3, revocations: 2, losses: 0 };
    let two = Bounds { peers: 3, targets: 2, grants: 2, uses: 1, revocations: 1, losses: 1 };
    let lossy = Bounds { peers: 2, targets: 1, grants: 1, uses: 3, revocations: 1, losses: 2 };
    for bounds in [one, two, lossy] {
        println!("{} states with {bounds:?}", explore(bounds));
    }
}

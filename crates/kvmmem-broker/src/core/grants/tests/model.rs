// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table against a model that keeps everything and searches it from end to end.

use std::collections::BTreeMap;

use super::*;

const TOKENS: u64 = 6;

const PEERS: u64 = 4;

#[derive(Clone, Debug)]
enum Step {
    Mint { token: u64, target: u64, holder: Holder, uses: u32, ttl_ms: u64, origin: Origin },
    Redeem { token: u64, by: u64 },
    Used { grant: u64, by: u64 },
    Attach { token: u64, by: u64, read_only: bool },
    UndoRedeem { grant: u64, by: u64 },
    UndoAttach { view: u64, by: u64 },
    Detach { view: u64, by: u64 },
    Count { view: u64, by: u64, seeks: u64 },
    NotPushed { grant: u64, holder: u64 },
    Revoke { grant: u64 },
    Confirm { grant: u64, by: u64 },
    ForgetTarget { target: u64 },
    ForgetPeer { peer: u64 },
    Wait { ms: u64 },
}

fn any_step() -> impl Strategy<Value = Step> {
    let (token, peer, id) = (0..TOKENS, 1..PEERS, 1u64..12);
    let holder = prop_oneof![
        Just(Holder::Anybody),
        peer.clone().prop_map(Holder::Pushed),
        peer.clone().prop_map(|peer| Holder::Vm(uuid(peer))),
    ];
    let mint = (token.clone(), peer.clone(), holder, 1u32..4, 1u64..5000, any::<bool>());
    prop_oneof![
        4 => mint.prop_map(|(token, target, holder, uses, ttl_ms, is_kvmi)| {
            // Only tokens of KVMI's are pushed.
            let is_pushed = matches!(holder, Holder::Pushed(_));
            let origin = if is_kvmi || is_pushed { Origin::Kvmi } else { Origin::Operator };
            Step::Mint { token, target, holder, uses, ttl_ms, origin }
        }),
        3 => (token.clone(), peer.clone()).prop_map(|(token, by)| Step::Redeem { token, by }),
        4 => (1u64..6, peer.clone()).prop_map(|(grant, by)| Step::Used { grant, by }),
        4 => (token, peer.clone(), any::<bool>())
            .prop_map(|(token, by, read_only)| Step::Attach { token, by, read_only }),
        6 => (1u64..6, peer.clone()).prop_map(|(grant, by)| Step::UndoRedeem { grant, by }),
        3 => (id.clone(), peer.clone()).prop_map(|(view, by)| Step::UndoAttach { view, by }),
        2 => (id.clone(), peer.clone()).prop_map(|(view, by)| Step::Detach { view, by }),
        1 => (id.clone(), peer.clone(), any::<u64>()).prop_map(|(view, by, seeks)| Step::Count { view, by, seeks }),
        1 => (id.clone(), peer.clone()).prop_map(|(grant, holder)| Step::NotPushed { grant, holder }),
        2 => id.clone().prop_map(|grant| Step::Revoke { grant }),
        2 => (id, peer.clone()).prop_map(|(grant, by)| Step::Confirm { grant, by }),
        1 => peer.clone().prop_map(|target| Step::ForgetTarget { target }),
        1 => peer.prop_map(|peer| Step::ForgetPeer { peer }),
        3 => prop_oneof![0u64..4000, 50_000u64..70_000].prop_map(|ms| Step::Wait { ms }),
    ]
}

/// What is known of a grant, for ever.
#[derive(Clone, Debug)]
struct GrantModel {
    token: u64,
    target: u64,
    holder: Holder,
    uses: u32,
    expires_ms: u64,
    revoked: bool,
    removed: bool,
    /// Each as often as it has used the token for a page.
    users: Vec<u64>,
    views: BTreeMap<u64, u64>,
    is_operator: bool,
}

impl GrantModel {
    /// The connections that have something by it.
    fn peers(&self) -> BTreeSet<u64> {
        let mut peers: BTreeSet<u64> =
            self.users.iter().chain(self.views.values()).copied().collect();
        if let Holder::Pushed(peer) = self.holder {
            peers.insert(peer);
        }
        peers
    }

    fn close_all(&mut self, by: u64) -> BTreeSet<u64> {
        let closed: BTreeSet<u64> =
            self.views.iter().filter(|(_, peer)| **peer == by).map(|(view, _)| *view).collect();
        self.views.retain(|_, peer| *peer != by);
        closed
    }

    fn state(&self, clock_ms: u64) -> GrantState {
        if self.revoked {
            GrantState::Revoked
        } else if self.uses == 0 {
            GrantState::Spent
        } else if self.expires_ms <= clock_ms {
            GrantState::Expired
        } else {
            GrantState::Active
        }
    }

    fn may_use(&self, by: u64, clock_ms: u64) -> bool {
        let is_holder = match self.holder {
            Holder::Anybody => true,
            Holder::Pushed(peer) => peer == by,
            Holder::Vm(holder) => holder == uuid(by),
        };
        !self.removed && is_holder && self.state(clock_ms) == GrantState::Active
    }
}

#[derive(Default)]
struct Model {
    grants: Vec<GrantModel>,
    clock_ms: u64,
}

impl Model {
    fn grant(&mut self, id: u64) -> Option<&mut GrantModel> {
        self.grants.get_mut(usize::try_from(id - 1).unwrap()).filter(|grant| !grant.removed)
    }

    /// The grant that a token opens for a connection, and its number.
    fn usable(&mut self, token: u64, by: u64) -> Result<(u64, &mut GrantModel), UseError> {
        let clock_ms = self.clock_ms;
        let mut found = (1..).zip(&mut self.grants);
        let (id, grant) = found
            .find(|(_, grant)| grant.token == token && grant.may_use(by, clock_ms))
            .ok_or(UseError::Unknown)?;
        if grant.target == by { Err(UseError::Own) } else { Ok((id, grant)) }
    }

    fn views(&self) -> BTreeMap<u64, u64> {
        self.grants.iter().flat_map(|grant| grant.views.clone()).collect()
    }
}

fn ids(views: &[View]) -> BTreeSet<u64> {
    views.iter().map(|view| view.id).collect()
}

proptest! {
    #[test]
    fn the_table_does_as_a_model_does(steps in proptest::collection::vec(any_step(), 0..100)) {
        let start = Instant::now();
        let (mut grants, mut model) = (Grants::default(), Model::default());
        let mut last_view = 0;
        for step in steps {
            let now = start + Duration::from_millis(model.clock_ms);
            let clock_ms = model.clock_ms;
            match step {
                // Tokens are random: none that is known is ever made again.
                Step::Mint { token: name, .. } if model.grants.iter().any(|grant| grant.token == name && !grant.removed) => {}
                Step::Mint { token: name, target, holder, uses, ttl_ms, origin } => {
                    let terms = Terms {
                        target,
                        scope: Scope::whole(Rights::ReadWrite),
                        lifetime: Duration::from_millis(ttl_ms),
                        uses,
                        holder,
                        label: None,
                        origin,
                        by: BY,
                    };
                    let id = grants.mint(now, token(name), terms).unwrap();
                    model.grants.push(GrantModel {
                        token: name,
                        target,
                        holder,
                        uses,
                        expires_ms: clock_ms + ttl_ms,
                        revoked: false,
                        removed: false,
                        users: Vec::new(),
                        views: BTreeMap::new(),
                        is_operator: origin == Origin::Operator,
                    });
                    prop_assert_eq!(id, model.grants.len() as u64);
                }
                Step::Redeem { token: name, by } => {
                    let expected = model.usable(name, by).map(|(id, grant)| {
                        if grant.holder == Holder::Pushed(by) {
                            return None;
                        }
                        grant.uses -= 1;
                        grant.users.push(by);
                        Some(id)
                    });
                    let redeemed = grants.redeem(now, &token(name), user(by));
                    let redeemed = redeemed.map(|opened| opened.map(|opened| opened.grant));
                    prop_assert_eq!(redeemed, expected);
                }
                Step::Used { grant: id, by } => {
                    let used = grants.used(now, id, by).map(|opened| opened.grant);
                    // One that is over may have left the table.
                    let is_there = grants.grants.contains_key(&id);
                    let grant = model.grant(id).filter(|grant| {
                        is_there && grant.holder == Holder::Pushed(by) && grant.uses > 0
                    });
                    prop_assert_eq!(used, grant.is_some().then_some(id));
                    if let Some(grant) = grant {
                        grant.uses -= 1;
                        grant.users.push(by);
                    }
                }
                Step::Attach { token: name, by, read_only } => {
                    let expected = model.usable(name, by).map(|(id, grant)| {
                        grant.uses -= 1;
                        last_view += 1;
                        grant.views.insert(last_view, by);
                        (last_view, id)
                    });
                    let attached = attach(&mut grants, now, name, user(by), read_only);
                    if let Ok((_, opened)) = &attached {
                        prop_assert_eq!(opened.scope.rights == Rights::ReadOnly, read_only);
                    }
                    prop_assert_eq!(attached.map(|(view, opened)| (view, opened.grant)), expected);
                }
                Step::UndoRedeem { grant: id, by } => {
                    grants.undo_redeem(now, id, user(by));
                    if let Some(grant) = model.grant(id) {
                        if let Some(index) = grant.users.iter().position(|user| *user == by) {
                            grant.users.remove(index);
                            grant.uses += u32::from(grant.is_operator);
                        } else if grant.holder == Holder::Pushed(by) {
                            grant.holder = Holder::Vm(uuid(by));
                        }
                    }
                }
                Step::UndoAttach { view, by } => {
                    let is_theirs = model.views().get(&view) == Some(&by);
                    prop_assert_eq!(grants.undo_attach(now, view, by).is_some(), is_theirs);
                    for grant in &mut model.grants {
                        if is_theirs && grant.views.remove(&view).is_some() {
                            grant.uses += u32::from(grant.is_operator);
                        }
                    }
                }
                Step::Detach { view, by } => {
                    let is_theirs = model.views().get(&view) == Some(&by);
                    prop_assert_eq!(grants.detach(now, view, by).is_some(), is_theirs);
                    if is_theirs {
                        for grant in &mut model.grants {
                            grant.views.remove(&view);
                        }
                    }
                }
                Step::Count { view, by, seeks } => {
                    let counters = ViewCounters { seeks, refused_writes: 0 };
                    prop_assert_eq!(grants.count(view, by, counters), model.views().get(&view) == Some(&by));
                }
                Step::NotPushed { grant, holder } => {
                    grants.not_pushed(grant, uuid(holder));
                    if let Some(grant) = model.grant(grant).filter(|grant| matches!(grant.holder, Holder::Pushed(_))) {
                        grant.holder = Holder::Vm(uuid(holder));
                    }
                }
                Step::Revoke { grant: id } => {
                    let affected = grants.revoke(now, id);
                    if let Some(grant) = model.grant(id).filter(|_| affected.is_some()) {
                        let peers = grant.peers();
                        grant.revoked = true;
                        let expected = RevokedGrant { target: grant.target, peers, views: grant.views.len() };
                        prop_assert_eq!(affected, Some(expected));
                    } else {
                        prop_assert_eq!(affected, None);
                    }
                }
                Step::Confirm { grant: id, by } => {
                    let ended = grants.confirm(now, id, by);
                    let mut expected = BTreeSet::new();
                    if let Some(grant) = model.grant(id).filter(|grant| grant.revoked) {
                        grant.users.retain(|user| *user != by);
                        if grant.holder == Holder::Pushed(by) {
                            grant.holder = Holder::Anybody;
                        }
                        expected = grant.close_all(by);
                    }
                    prop_assert_eq!(ids(&ended), expected);
                }
                Step::ForgetTarget { target } => {
                    let ended = grants.forget_target(target);
                    let mut expected = BTreeSet::new();
                    for grant in model.grants.iter_mut().filter(|grant| grant.target == target) {
                        grant.removed = true;
                        expected.extend(std::mem::take(&mut grant.views).into_keys());
                    }
                    prop_assert_eq!(ids(&ended), expected);
                }
                Step::ForgetPeer { peer } => {
                    let ended = grants.forget_peer(now, peer);
                    let mut expected = BTreeSet::new();
                    for grant in &mut model.grants {
                        expected.extend(grant.close_all(peer));
                        grant.users.retain(|user| *user != peer);
                        if grant.holder == Holder::Pushed(peer) && grant.views.is_empty() {
                            grant.removed = true;
                        }
                    }
                    prop_assert_eq!(ids(&ended), expected);
                }
                Step::Wait { ms } => model.clock_ms += ms,
            }
            // The model forgets as the table does; what is usable or has views never leaves.
            grants.advance(start + Duration::from_millis(model.clock_ms));
            for (id, grant) in (1..).zip(&mut model.grants) {
                let is_there = grants.grants.contains_key(&id);
                let uses = grants.grants.get(&id).map_or(grant.uses, |grant| grant.uses_left);
                prop_assert_eq!(uses, grant.uses);
                prop_assert!(!(is_there && grant.removed));
                if !is_there {
                    prop_assert!(grant.views.is_empty());
                    prop_assert!(grant.removed || grant.state(model.clock_ms) != GrantState::Active);
                    grant.removed = true;
                }
            }
            check(&grants, start + Duration::from_millis(model.clock_ms))?;
            let views: BTreeSet<u64> = grants.views.keys().copied().collect();
            prop_assert_eq!(views, model.views().into_keys().collect::<BTreeSet<_>>());
        }
    }
}

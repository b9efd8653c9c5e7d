// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table against a model that keeps everything and searches it from end to end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Caller, Cursor, GrantState, Origin, ViewCounters};
use kvmmem_proto::scope::{Rights, Scope};
use proptest::prelude::*;
use uuid::Uuid;

use super::error::MintError;
use super::grant::Grant;
use super::*;
use crate::core::limits::{KEPT, KVMI_LIFETIME, MAX_LEAVING, MAX_OPERATOR};
use crate::core::quota::QuotaError;

const TOKENS: u64 = 6;

/// Root.
const BY: Credentials = Credentials { pid: 1, uid: 0 };

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

fn uuid(peer: u64) -> Uuid {
    Uuid::from_u128(u128::from(peer) + 100)
}

/// The connections are those of VMs that have the same number.
fn user(peer: u64) -> User {
    User { peer, vm: Some(peer), uuid: Some(uuid(peer)) }
}

fn caller() -> Caller {
    Caller { pid: 1, uid: 2, comm: "tool".into() }
}

fn token(n: u64) -> Token {
    Token::new([n, 0, 0, 7])
}

/// Opens a view by a token.
fn attach(
    grants: &mut Grants,
    now: Instant,
    n: u64,
    by: User,
    read_only: bool,
) -> Result<(u64, Access), UseError> {
    let grant = grants.would_open(now, &token(n), by)?.grant;
    grants.attach(now, grant, by, ("by", caller()), read_only)
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

/// What the indexes say is what the table says.
fn check(grants: &Grants, now: Instant) -> Result<(), TestCaseError> {
    let of = |grant: &&Grant, origin| grant.terms.origin == origin;
    let active = |grant: &&Grant| grant.state(now) == GrantState::Active;
    let kvmi =
        grants.grants.values().filter(|grant| of(grant, Origin::Kvmi)).filter(active).count();
    prop_assert_eq!(grants.outstanding.values().sum::<usize>(), kvmi);
    prop_assert!(grants.outstanding.values().all(|count| *count > 0));
    let staying = |grant: &&Grant| active(grant) || grant.is_in_use();
    let operator =
        grants.grants.values().filter(|grant| of(grant, Origin::Operator)).filter(staying).count();
    prop_assert_eq!(grants.operator.count(), operator);
    prop_assert_eq!(grants.expiring.len(), grants.grants.values().filter(active).count());
    prop_assert_eq!(
        grants.leaving.count(),
        grants.grants.values().filter(|grant| !staying(grant)).count()
    );
    for (id, grant) in &grants.grants {
        let found = grant.token.as_deref().map(|token| grants.find(token));
        prop_assert!(found.is_none_or(|found| found == Some(*id)));
        let may_be_used = grant.uses_left > 0 || grant.may_be_returned();
        prop_assert_eq!(grant.token.is_some(), may_be_used && !grant.revoked);
        prop_assert!(grant.uses_left <= grant.terms.uses);
    }
    let of_target = grants.grants.iter().map(|(id, grant)| (grant.terms.target, *id));
    prop_assert_eq!(&grants.of_target, &of_target.collect());
    let of_peer = grants
        .grants
        .iter()
        .flat_map(|(id, grant)| grant.peers().into_iter().map(|peer| (peer, *id)));
    prop_assert_eq!(&grants.of_peer, &of_peer.collect());
    let views: usize = grants.views_of_peer.values().map(BTreeSet::len).sum();
    prop_assert_eq!(views, grants.views.len());
    prop_assert!(grants.views_of_peer.values().all(|views| !views.is_empty()));
    prop_assert_eq!(views, grants.grants.values().map(|grant| grant.views.len()).sum::<usize>());
    Ok(())
}

fn terms(target: u64, origin: Origin, uses: u32) -> Terms {
    Terms {
        target,
        scope: Scope::whole(Rights::ReadWrite),
        lifetime: KVMI_LIFETIME,
        uses,
        holder: Holder::Anybody,
        label: None,
        origin,
        by: BY,
    }
}

#[test]
fn a_target_has_at_most_64_tokens_of_kvmi() {
    let (mut grants, now) = (Grants::default(), Instant::now());
    let kvmi = |target| terms(target, Origin::Kvmi, 1);
    for n in 0..64 {
        grants.mint(now, token(n), kvmi(1)).unwrap();
    }
    assert_eq!(grants.mint(now, token(64), kvmi(1)), Err(MintError::Outstanding(1)));
    grants.mint(now, token(65), kvmi(2)).unwrap();
    grants.mint(now, token(66), terms(1, Origin::Operator, 1)).unwrap();
    grants.mint(now + KVMI_LIFETIME, token(67), kvmi(1)).unwrap();
    assert_eq!(grants.outstanding(1), 1);
}

#[test]
fn a_token_dies_when_its_time_is_over() {
    let (mut grants, now) = (Grants::default(), Instant::now());
    let last = now + KVMI_LIFETIME - Duration::from_nanos(1);
    grants.mint(now, token(1), terms(9, Origin::Kvmi, 1)).unwrap();
    assert!(grants.redeem(last, &token(1), user(1)).is_ok());
    grants.mint(now, token(2), terms(9, Origin::Kvmi, 1)).unwrap();
    assert_eq!(grants.redeem(now + KVMI_LIFETIME, &token(2), user(1)), Err(UseError::Unknown));
}

#[test]
fn operators_grants_are_bounded_and_make_room_when_they_end() {
    let (mut grants, now) = (Grants::default(), Instant::now());
    for n in 0..MAX_OPERATOR as u64 {
        grants.mint(now, token(n), terms(1, Origin::Operator, 1)).unwrap();
    }
    let more = |grants: &mut Grants, n| grants.mint(now, token(n), terms(1, Origin::Operator, 1));
    assert_eq!(more(&mut grants, 1 << 32), Err(MintError::Full(QuotaError::Total(MAX_OPERATOR))));
    // One with an open view keeps its place, one that was revoked does not.
    attach(&mut grants, now, 7, user(2), false).unwrap();
    assert_eq!(more(&mut grants, 1 << 32), Err(MintError::Full(QuotaError::Total(MAX_OPERATOR))));
    grants.revoke(now, 9).unwrap();
    more(&mut grants, 1 << 32).unwrap();
    assert_eq!(more(&mut grants, 2 << 32), Err(MintError::Full(QuotaError::Total(MAX_OPERATOR))));
}

#[test]
fn what_is_over_leaves_the_list_by_and_by() {
    let (mut grants, now) = (Grants::default(), Instant::now());
    for n in 0..2000 {
        grants.mint(now, token(n), terms(n, Origin::Kvmi, 1)).unwrap();
        grants.redeem(now, &token(n), User { peer: 1, vm: None, uuid: None }).unwrap();
    }
    grants.advance(now);
    assert_eq!(grants.len(), (MAX_LEAVING, 0));
    grants.advance(now + KEPT);
    assert!(grants.is_empty() && grants.tokens.is_empty());
}

#[test]
fn a_connection_has_at_most_64_views() {
    let (mut grants, now) = (Grants::default(), Instant::now());
    grants.mint(now, token(1), terms(9, Origin::Operator, 1000)).unwrap();
    let attach = |grants: &mut Grants, by| attach(grants, now, 1, user(by), false);
    for _ in 0..64 {
        attach(&mut grants, 1).unwrap();
    }
    assert_eq!(attach(&mut grants, 1).unwrap_err(), UseError::TooManyViews);
    attach(&mut grants, 2).unwrap();
    grants.detach(now, 3, 1).unwrap();
    attach(&mut grants, 1).unwrap();
}

#[test]
fn a_long_list_comes_in_pages_that_lose_nothing() {
    let (mut grants, now) = (Grants::default(), Instant::now());
    grants.mint(now, token(0), terms(9, Origin::Operator, 300)).unwrap();
    for n in 1..200 {
        grants.mint(now, token(n), terms(9, Origin::Operator, 1)).unwrap();
    }
    for n in 0..300 {
        let by = user(10 + n / 60);
        attach(&mut grants, now, 0, by, false).unwrap();
    }
    let (mut after, mut seen, mut views, mut pages) =
        (Cursor::default(), BTreeSet::new(), Vec::new(), 0);
    let names = |_, _| {
        Some(Names { target: "tiger".into(), target_uuid: Uuid::from_u128(1), holder: None })
    };
    loop {
        let (page, next) = grants.list(now, after, names);
        pages += 1;
        seen.extend(page.iter().map(|listed| listed.id));
        views.extend(page.iter().flat_map(|listed| listed.views.iter().map(|view| view.id)));
        match next {
            Some(next) => {
                assert!(next > after);
                after = next;
            }
            None => break,
        }
    }
    assert_eq!(seen, (1..=200).collect());
    assert_eq!(views, (1..=300).collect::<Vec<_>>());
    assert!(pages > 3);
}

#[test]
fn who_ends_many_grants_pushes_no_others_off_the_list() {
    let (mut grants, now) = (Grants::default(), Instant::now());
    let kvmi = grants.mint(now, token(1), terms(9, Origin::Kvmi, 1)).unwrap();
    grants.redeem(now, &token(1), user(1)).unwrap();
    for n in 0..2 * MAX_LEAVING as u64 {
        let id = grants.mint(now, token(10 + n), terms(8, Origin::Operator, 1)).unwrap();
        grants.revoke(now, id).unwrap();
    }
    grants.advance(now);
    assert_eq!(grants.len(), (MAX_LEAVING, 0));
    assert!(grants.revoke(now, kvmi).is_some(), "the page that it mapped can still be revoked");
}

/// The token of a use that may be returned is kept, and no longer.
#[test]
fn a_use_is_returned_where_the_files_do_not_arrive() {
    let (mut grants, now) = (Grants::default(), Instant::now());
    for (n, origin) in [(1, Origin::Operator), (2, Origin::Kvmi)] {
        grants.mint(now, token(n), terms(9, origin, 1)).unwrap();
    }
    let by = user(1);
    let attach = |grants: &mut Grants, n| {
        let attached = attach(grants, now, n, by, true);
        attached.map(|(view, _)| view)
    };
    let view = attach(&mut grants, 1).unwrap();
    assert_eq!(attach(&mut grants, 1), Err(UseError::Unknown));
    assert!(grants.undo_attach(now, view, 2).is_none());
    assert!(grants.undo_attach(now, view, 1).is_some());
    assert!(grants.undo_attach(now, view, 1).is_none());
    // The same by a page.
    grants.redeem(now, &token(1), by).unwrap();
    grants.undo_redeem(now, 1, user(2));
    assert_eq!(attach(&mut grants, 1), Err(UseError::Unknown));
    grants.undo_redeem(now, 1, by);
    grants.undo_redeem(now, 1, by);
    assert!(grants.peers_of(1).is_empty());
    // A view that is closed has been used.
    let view = attach(&mut grants, 1).unwrap();
    assert!(grants.grants[&1].token.is_some());
    grants.detach(now, view, 1).unwrap();
    assert!(grants.grants[&1].token.is_none());
    assert_eq!(attach(&mut grants, 1), Err(UseError::Unknown));
    // A token of KVMI's lives for seconds.
    let view = attach(&mut grants, 2).unwrap();
    assert!(grants.undo_attach(now, view, 1).is_some());
    assert_eq!(attach(&mut grants, 2), Err(UseError::Unknown));
    check(&grants, now).unwrap();
}

/// A page that was mapped by another use of the same token stays known.
#[test]
fn each_use_that_is_lost_comes_back_once() {
    let (mut grants, now) = (Grants::default(), Instant::now());
    grants.mint(now, token(1), terms(9, Origin::Operator, 3)).unwrap();
    for _ in 0..3 {
        grants.redeem(now, &token(1), user(1)).unwrap();
    }
    for left in 1..3 {
        grants.undo_redeem(now, 1, user(1));
        assert_eq!((grants.uses_left(1), grants.mapped(1, 1)), (left, Some(9)));
    }
    check(&grants, now).unwrap();
}

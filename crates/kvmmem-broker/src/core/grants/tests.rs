// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits, and what the table does in single cases; `model` has all others.

mod model;

use std::collections::BTreeSet;
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

/// Root.
const BY: Credentials = Credentials { pid: 1, uid: 0 };

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

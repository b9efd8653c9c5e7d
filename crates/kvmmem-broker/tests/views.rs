// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Grants and views of VMs through a running broker.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvmmem_client::ClientError;
use kvmmem_client::admin::{GrantRequest, GrantState, KvmiPolicy, Origin, Span};
use kvmmem_client::vmm::{Change, RedeemError, Region, Rights, Token, ViewCounters, VmmLink};
use kvmmem_proto::message::Refusal;

use common::{
    TestBroker, caller, ram, regions, request, short_confirmation, target, uuid, wait_for,
};
use kvmmem_abi::errno::KvmError;

const NO_PAUSE: Duration = Duration::ZERO;

#[test]
fn an_operator_s_grant_opens_as_many_views_as_it_says() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let (lion, views) = broker.viewer("lion", 7, NO_PAUSE);
    let spans = Some(vec![Span { gpa: 0x1000, len: 0x2000 }, Span { gpa: 0x10_0000, len: 0x1000 }]);
    let label = Some("nightly scan".to_owned());
    let granted =
        broker.grant(&GrantRequest { spans, uses: 2, label, ..request(Rights::ReadWrite) });

    let first = views.open(&lion, &granted.token).unwrap();
    assert_eq!(
        (first.grant, first.target.name(), first.scope.rights),
        (granted.grant, "tiger", Rights::ReadWrite)
    );
    let reached = first.scope.regions(first.target.map());
    let region = |gpa, len| Region { gpa, len, offset: gpa, file: 0 };
    assert_eq!(reached, [region(0x1000, 0x2000), region(0x10_0000, 0x1000)]);
    let second = lion.attach(&granted.token, &caller(), true).unwrap();
    assert_eq!(second.scope.rights, Rights::ReadOnly);
    assert_ne!(second.view, first.view);
    assert_eq!(lion.attach(&granted.token, &caller(), true).unwrap_err(), RedeemError::Unknown);
    assert_eq!(lion.redeem(&granted.token).unwrap_err(), RedeemError::Unknown);

    lion.counters(first.view, ViewCounters { seeks: 3, refused_writes: 4 });
    wait_for("the counters to come", || broker.grants()[0].views[0].counters.seeks == 3);
    let listed = &broker.grants()[0];
    assert_eq!((listed.id, listed.target.as_str(), listed.uses_left), (granted.grant, "tiger", 0));
    assert_eq!((listed.state, listed.origin), (GrantState::Spent, Origin::Operator));
    assert_eq!(listed.label.as_deref(), Some("nightly scan"));
    assert_eq!(listed.target_uuid, uuid("tiger"));
    assert_eq!(listed.views.len(), 2);
    let view = &listed.views[0];
    assert_eq!((view.id, view.by.as_str(), view.by_uuid), (first.view, "lion", Some(uuid("lion"))));
    assert_eq!((view.pid, view.uid, view.comm.as_str()), (4711, 1000, "scan"));
    assert_eq!(view.counters, ViewCounters { seeks: 3, refused_writes: 4 });

    lion.detached(first.view, ViewCounters::default());
    wait_for("the view to end", || broker.grants()[0].views.len() == 1);
    assert!(lion.current(first.view).is_none() && lion.current(second.view).is_some());
    // Twice, or none of its own: nothing happens.
    lion.detached(first.view, ViewCounters::default());
    lion.detached(99, ViewCounters::default());
    drop(lion);
    wait_for("the other to end", || broker.grants()[0].views.is_empty());
}

#[test]
fn only_the_holder_may_use_a_grant_that_has_one() {
    let broker = TestBroker::start();
    let tiger = broker.target("tiger");
    let puma = broker.introspector("puma", 8);
    // The holder is not there yet.
    let holder = Some(uuid("lion"));
    let granted = broker.grant(&GrantRequest { holder, ..request(Rights::ReadOnly) });
    assert_eq!(puma.attach(&granted.token, &caller(), true).unwrap_err(), RedeemError::Unknown);
    assert_eq!(puma.redeem(&granted.token).unwrap_err(), RedeemError::Unknown);
    assert_eq!(tiger.attach(&granted.token, &caller(), true).unwrap_err(), RedeemError::Denied);
    assert_eq!(broker.grants()[0].holder, holder);
    let lion = broker.introspector("lion", 7);
    assert_eq!(
        lion.attach(&granted.token, &caller(), false).unwrap().scope.rights,
        Rights::ReadOnly
    );
}

#[test]
fn a_request_that_breaks_a_rule_is_refused_by_name() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let _lion = broker.introspector("lion", 7);
    let mut admin = broker.admin();
    let mut refused = |change: &dyn Fn(&mut GrantRequest)| {
        let mut asked = request(Rights::ReadOnly);
        change(&mut asked);
        match admin.grant(&asked) {
            Err(ClientError::Refused { refusal, message }) => (refusal, message),
            other => panic!("{other:?}"),
        }
    };
    let (refusal, message) =
        refused(&|asked| asked.spans = Some(vec![Span { gpa: 0x8000, len: 0x1000 }]));
    assert_eq!(refusal, Refusal::Invalid);
    assert!(message.contains("0x8000..0x9000") && message.contains("0x0..0x4000"), "{message}");
    type Change<'a> = &'a dyn Fn(&mut GrantRequest);
    let cases: [(Change<'_>, &str); 9] = [
        (&|asked| asked.spans = Some(vec![]), "no range"),
        (&|asked| asked.spans = Some(vec![Span { gpa: !0xfff, len: 0x2000 }]), "out of range"),
        (&|asked| asked.spans = Some(vec![Span { gpa: 7, len: 0x1000 }]), "page-aligned"),
        (&|asked| asked.ttl_ms = 0, "0 ms"),
        (&|asked| asked.ttl_ms = 31 * 24 * 60 * 60 * 1000, "30 days"),
        (&|asked| asked.uses = 0, "at least one use"),
        (&|asked| asked.label = Some("x".repeat(65)), "64 bytes"),
        (&|asked| asked.label = Some("a\u{1b}[2J".into()), "control"),
        (&|asked| asked.holder = Some(uuid("tiger")), "own memory"),
    ];
    for (change, words) in cases {
        let (refusal, message) = refused(change);
        assert!(refusal == Refusal::Invalid && message.contains(words), "{message}");
    }
    assert_eq!(refused(&|asked| asked.target = "nobody".into()).0, Refusal::Unknown);
    assert!(refused(&|asked| asked.target = "lion".into()).1.contains("--introspectable"));
    assert_eq!(broker.grants(), []);
}

#[test]
fn a_revoked_grant_is_nobody_s_when_the_answer_comes() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let (lion, lions) = broker.viewer("lion", 7, Duration::from_millis(5));
    let (puma, pumas) = broker.viewer("puma", 8, NO_PAUSE);
    let granted = broker.grant(&GrantRequest { uses: 100, ..request(Rights::ReadOnly) });
    let other = broker.grant(&request(Rights::ReadOnly));
    lions.open(&lion, &granted.token).unwrap();
    lions.open(&lion, &granted.token).unwrap();
    let kept = lions.open(&lion, &other.token).unwrap();
    pumas.open(&puma, &granted.token).unwrap();
    // One that has used it for a page is told as well.
    let (wolf, wolves) = broker.viewer("wolf", 9, NO_PAUSE);
    assert_eq!(wolf.redeem(&granted.token).unwrap().grant, granted.grant);

    let revoked = broker.admin().revoke(granted.grant).unwrap();
    assert_eq!((revoked.views, revoked.unconfirmed), (3, 0));
    assert_eq!((lions.count(), pumas.count()), (1, 0));
    assert_eq!(wolves.log(), [format!("revoke {}", granted.grant)]);
    assert!(wolf.is_revoked(granted.grant) && lion.current(kept.view).is_some());
    assert_eq!(lion.attach(&granted.token, &caller(), true).unwrap_err(), RedeemError::Unknown);
    let listed = broker.grants();
    assert_eq!((listed[0].state, listed[0].views.len()), (GrantState::Revoked, 0));
    assert_eq!(listed[1].views.len(), 1);

    // Again: no peer is left to be notified.
    let again = broker.admin().revoke(granted.grant).unwrap();
    assert_eq!((again.views, again.unconfirmed), (0, 0));
    let unknown = broker.admin().revoke(99);
    assert!(
        matches!(unknown, Err(ClientError::Refused { refusal: Refusal::Unknown, .. })),
        "{unknown:?}"
    );
}

#[test]
fn a_vmm_that_does_not_confirm_is_counted() {
    let broker = TestBroker::start_with(short_confirmation());
    let _tiger = broker.target("tiger");
    // It has no handler for its events.
    let lion = broker.introspector("lion", 7);
    let granted = broker.grant(&request(Rights::ReadOnly));
    lion.attach(&granted.token, &caller(), false).unwrap();
    let began = Instant::now();
    let revoked = broker.admin().revoke(granted.grant).unwrap();
    assert_eq!((revoked.views, revoked.unconfirmed), (1, 1));
    assert!(began.elapsed() >= Duration::from_secs(2) && revoked.micros >= 2_000_000);
    // Listed until it confirms, late.
    assert_eq!(broker.grants()[0].views.len(), 1);
    lion.revoked(granted.grant);
    wait_for("the view to end", || broker.grants()[0].views.is_empty());
}

#[test]
fn a_vmm_that_goes_is_not_waited_for() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let lion = broker.introspector("lion", 7);
    let granted = broker.grant(&request(Rights::ReadOnly));
    lion.attach(&granted.token, &caller(), false).unwrap();
    let revoked = std::thread::scope(|scope| {
        let revoking = scope.spawn(|| broker.revoke(granted.grant));
        wait_for("the news to come", || lion.is_revoked(granted.grant));
        drop(lion);
        revoking.join().unwrap()
    });
    assert_eq!(revoked.unconfirmed, 1);
}

#[test]
fn whoever_attaches_while_the_grant_is_revoked_ends_up_without_a_view() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let (lion, views) = broker.viewer("lion", 7, NO_PAUSE);
    for _ in 0..60 {
        let granted = broker.grant(&GrantRequest { uses: 1000, ..request(Rights::ReadOnly) });
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        if let Ok(view) = views.open(&lion, &granted.token) {
                            lion.detached(view.view, ViewCounters::default());
                            views.open.lock().unwrap().retain(|other| other.view != view.view);
                        }
                    }
                });
            }
            let revoked = broker.admin().revoke(granted.grant).unwrap();
            is_over.store(true, Ordering::Relaxed);
            assert_eq!(revoked.unconfirmed, 0);
        });
        assert_eq!(views.count(), 0);
    }
    wait_for("every view to end", || broker.state.grant_count().1 == 0);
}

#[test]
fn a_pushed_token_is_used_once_by_pages_and_views_together() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let lion = broker.introspector("lion", 7);
    let vm = broker.state.number("tiger").unwrap();
    for round in 0..100 {
        let token = broker.mint(vm, 7).unwrap();
        if round % 2 == 0 {
            // Give the push time to come, or none.
            std::thread::sleep(Duration::from_millis(2));
        }
        let won = std::thread::scope(|scope| {
            let pages: Vec<_> =
                (0..2).map(|_| scope.spawn(|| lion.redeem(&token).is_ok())).collect();
            let views: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let attached = lion.attach(&token, &caller(), true);
                        attached
                            .map(|view| lion.detached(view.view, ViewCounters::default()))
                            .is_ok()
                    })
                })
                .collect();
            pages
                .into_iter()
                .chain(views)
                .map(|each| each.join().unwrap())
                .filter(|won| *won)
                .count()
        });
        assert!(won <= 1, "used {won} times");
        assert_eq!(lion.redeem(&token).unwrap_err(), RedeemError::Unknown);
        assert_eq!(lion.attach(&token, &caller(), true).unwrap_err(), RedeemError::Unknown);
    }
    wait_for("every token to be used", || broker.state.grant_count().1 == 0);
}

#[test]
fn revoking_a_pushed_token_voids_it_where_it_was_pushed() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let (lion, _views) = broker.viewer("lion", 7, NO_PAUSE);
    let vm = broker.state.number("tiger").unwrap();
    let token = broker.mint(vm, 7).unwrap();
    let listed = &broker.grants()[0];
    assert_eq!((listed.origin, listed.holder), (Origin::Kvmi, Some(uuid("lion"))));
    assert_eq!(broker.admin().revoke(listed.id).unwrap().unconfirmed, 0);
    assert_eq!(lion.redeem(&token).unwrap_err(), RedeemError::Unknown);
}

#[test]
fn kvmi_makes_what_the_policy_says() {
    let broker = TestBroker::start();
    let mut admin = broker.admin();
    let tigers = uuid("tiger").to_string();
    // Before the VM is there, by its UUID.
    assert_eq!(admin.policy(&tigers, None).unwrap(), KvmiPolicy::ReadWrite);
    assert_eq!(admin.policy(&tigers, Some(KvmiPolicy::None)).unwrap(), KvmiPolicy::None);
    let unknown = admin.policy("tiger", None);
    assert!(
        matches!(unknown, Err(ClientError::Refused { refusal: Refusal::Unknown, .. })),
        "{unknown:?}"
    );
    let tiger = broker.target("tiger");
    let lion = broker.introspector("lion", 7);
    let vm = broker.state.number("tiger").unwrap();
    let mint = || broker.mint_bearer(vm);
    assert_eq!(mint().err(), Some(KvmError::Perm));
    admin.policy("tiger", Some(KvmiPolicy::ReadOnly)).unwrap();
    assert_eq!(lion.redeem(&mint().unwrap()).unwrap().scope.rights, Rights::ReadOnly);
    assert_eq!(
        lion.attach(&mint().unwrap(), &caller(), false).unwrap().scope.rights,
        Rights::ReadOnly
    );
    // It outlives the VM.
    drop((vm, tiger));
    wait_for("the target to go", || broker.state.number("tiger").is_none());
    let _tiger = broker.target("tiger");
    assert_eq!(admin.policy("tiger", None).unwrap(), KvmiPolicy::ReadOnly);
    broker.state.set_kvmi_tokens(KvmiPolicy::None);
    assert_eq!(admin.policy("tiger", None).unwrap(), KvmiPolicy::ReadOnly);
    assert_eq!(admin.policy(&uuid("lion").to_string(), None).unwrap(), KvmiPolicy::None);
}

#[test]
fn views_hear_of_their_target_s_changes_and_of_its_end() {
    let broker = TestBroker::start();
    let tiger = broker.target("tiger");
    let (lion, views) = broker.viewer("lion", 7, NO_PAUSE);
    let granted = broker.grant(&request(Rights::ReadOnly));
    let view = views.open(&lion, &granted.token).unwrap();
    let first = view.target.generation();

    tiger.ram_changed(regions(), Change::Reset);
    wait_for("the reset to be told", || {
        views.log() == [format!("changed to {} with 2 regions", first + 1)]
    });
    let fewer = vec![Region { gpa: 0, len: 0x4000, offset: 0, file: 0 }];
    tiger.ram_changed(fewer.clone(), Change::Resized);
    wait_for("the new map to be told", || views.log().len() == 2);
    let current = lion.current(view.view).unwrap();
    assert_eq!((current.generation(), current.map().regions()), (first + 2, &fewer[..]));
    assert_eq!(view.target.map().regions().len(), 2);
    assert_eq!(broker.admin().targets().unwrap()[0].memory_bytes, 0x4000);
    // What is refused changes nothing.
    tiger.ram_changed(vec![Region { gpa: 0, len: 1 << 40, offset: 0, file: 0 }], Change::Resized);
    tiger.ram_changed(vec![], Change::Reset);
    // A new viewer sees the new map.
    let puma = broker.introspector("puma", 8);
    let granted = broker.grant(&request(Rights::ReadOnly));
    assert_eq!(puma.attach(&granted.token, &caller(), true).unwrap().target.map().regions(), fewer);

    drop(tiger);
    wait_for("the end to be told", || views.count() == 0);
    assert_eq!(views.log()[2..], [format!("gone {}", view.target.id())]);
    assert!(lion.current(view.view).is_none());
    assert_eq!((broker.grants(), broker.state.grant_count()), (vec![], (0, 0)));
}

#[test]
fn a_broker_that_goes_ends_all_views() {
    let broker = TestBroker::start();
    let tiger = broker.target("tiger");
    let (lion, views) = broker.viewer("lion", 7, NO_PAUSE);
    let granted = broker.grant(&request(Rights::ReadOnly));
    let view = views.open(&lion, &granted.token).unwrap();
    let directory = broker.stop();
    // Its target's connection may end first.
    wait_for("the loss to be told", || views.log().last().is_some_and(|last| last == "lost"));
    assert!(views.count() == 0 && lion.current(view.view).is_none());
    assert_eq!(lion.attach(&granted.token, &caller(), true).unwrap_err(), RedeemError::Unavailable);

    // The layout that a VMM tells while no broker is there is the one that the next broker gets.
    let fewer = vec![Region { gpa: 0, len: 0x4000, offset: 0, file: 0 }];
    tiger.ram_changed(fewer.clone(), Change::Resized);
    let broker = TestBroker::start_in(directory);
    wait_for("the links to be back", || tiger.is_connected() && lion.is_connected());
    assert_eq!(lion.attach(&granted.token, &caller(), true).unwrap_err(), RedeemError::Unknown);
    let granted = broker.grant(&request(Rights::ReadOnly));
    // An old view's number is a new one's.
    let again = views.open(&lion, &granted.token).unwrap();
    assert_eq!((again.view, again.target.map().regions()), (view.view, &fewer[..]));
}

#[test]
fn a_vm_gets_no_view_of_itself_nor_without_a_right() {
    let broker = TestBroker::start();
    let mut both = target("tiger");
    both.identity.introspector = true;
    let tiger = VmmLink::connect(&broker.path, both, Some(ram())).unwrap();
    let granted = broker.grant(&request(Rights::ReadOnly));
    assert_eq!(tiger.attach(&granted.token, &caller(), true).unwrap_err(), RedeemError::Denied);
    let lion = broker.introspector("lion", 7);
    assert_eq!(
        lion.attach(&Token::new([1, 2, 3, 4]), &caller(), true).unwrap_err(),
        RedeemError::Unknown
    );
    // No use was taken.
    lion.attach(&granted.token, &caller(), true).unwrap();
}

#[test]
fn a_token_expires_and_its_view_stays() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let (lion, views) = broker.viewer("lion", 7, NO_PAUSE);
    let granted =
        broker.grant(&GrantRequest { ttl_ms: 60_000, uses: 5, ..request(Rights::ReadOnly) });
    let view = views.open(&lion, &granted.token).unwrap();
    broker.state.pass_time(Duration::from_secs(60));
    assert_eq!(lion.attach(&granted.token, &caller(), true).unwrap_err(), RedeemError::Unknown);
    let listed = &broker.grants()[0];
    assert_eq!(
        (listed.state, listed.views.len(), listed.expires_in_ms),
        (GrantState::Expired, 1, 0)
    );
    assert!(lion.current(view.view).is_some());
    assert_eq!(broker.admin().revoke(granted.grant).unwrap().views, 1);
    assert_eq!(views.count(), 0);
}

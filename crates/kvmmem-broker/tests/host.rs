// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views of processes of the host.

mod common;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use kvmmem_client::ClientError;
use kvmmem_client::admin::{GrantRequest, Span};
use kvmmem_client::vmm::{Change, Region, Rights, Token, VmmLink};
use kvmmem_proto::message::Refusal;

use common::{TestBroker, ram, regions, request, short_confirmation, target, uuid, wait_for};
use kvmmem::host::{HostEvent, HostLink};
use kvmmem_broker::Limits;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, pread, pwrite};

const SOON: Duration = common::PATIENCE;

fn attach(broker: &TestBroker, token: &Token) -> (HostLink, kvmmem::host::HostView) {
    HostLink::attach(&broker.path, token, false).unwrap()
}

#[test]
fn a_process_reads_what_its_grant_reaches_and_writes_only_by_right() {
    let broker = TestBroker::start();
    let memory = ram();
    pwrite(&memory, b"stripes", 0x10_1000).unwrap();
    let _tiger =
        VmmLink::connect(&broker.path, target("tiger"), Some(memory.try_clone().unwrap())).unwrap();
    let spans = Some(vec![Span { gpa: 0x10_1000, len: 0x10_0000 }]);
    let granted = broker.grant(&GrantRequest { spans, uses: 3, ..request(Rights::ReadOnly) });
    let (link, view) = attach(&broker, &granted.token);
    assert_eq!(view.uuid, uuid("tiger"));
    assert_eq!(view.rights, Rights::ReadOnly);
    assert_eq!(view.regions, [Region { gpa: 0x10_1000, len: 0x1000, offset: 0x10_1000, file: 0 }]);
    let mut bytes = [0; 7];
    pread(&view.files[0], &mut bytes, view.regions[0].offset).unwrap();
    assert_eq!(&bytes, b"stripes");
    assert_eq!(pwrite(&view.files[0], b"x", 0), Err(Errno::BADF));

    let listed = &broker.grants()[0].views[0];
    assert_eq!(
        (listed.by.as_str(), listed.by_uuid, listed.pid),
        ("host", None, std::process::id())
    );
    assert_eq!(listed.uid, rustix::process::getuid().as_raw());
    drop(link);
    wait_for("the view to end", || broker.grants()[0].views.is_empty());

    let granted = broker.grant(&GrantRequest { uses: 2, ..request(Rights::ReadWrite) });
    let (_, view) = attach(&broker, &granted.token);
    pwrite(&view.files[0], b"!", 0).unwrap();
    pread(&memory, &mut bytes[..1], 0).unwrap();
    assert_eq!((bytes[0], view.regions), (b'!', regions()));
    let (_, view) = HostLink::attach(&broker.path, &granted.token, true).unwrap();
    assert_eq!(
        (view.rights, pwrite(&view.files[0], b"x", 0)),
        (Rights::ReadOnly, Err(Errno::BADF))
    );
}

#[test]
fn a_token_that_is_not_a_process_s_is_refused() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let _lion = broker.introspector("lion", 7);
    let refused = |token: &Token| match HostLink::attach(&broker.path, token, true) {
        Err(ClientError::Refused { refusal, .. }) => refusal,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&Token::new([1, 2, 3, 4])), Refusal::Unknown);
    let holder = Some(uuid("lion"));
    let held = broker.grant(&GrantRequest { holder, ..request(Rights::ReadOnly) });
    assert_eq!(refused(&held.token), Refusal::Unknown);
    let nowhere = HostLink::attach(&broker.directory.path().join("none"), &held.token, true);
    assert!(matches!(nowhere, Err(ClientError::Connect { .. })), "{nowhere:?}");
}

#[test]
fn a_view_that_would_not_reach_what_the_process_wants_uses_no_token() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let spans = Some(vec![Span { gpa: 0x10_1000, len: 0x10_0000 }]);
    let granted = broker.grant(&GrantRequest { spans, ..request(Rights::ReadOnly) });
    let attach =
        |reaching: &[Span]| HostLink::attach_reaching(&broker.path, &granted.token, true, reaching);
    let (wanted, missed) = (Span { gpa: 0x10_1800, len: 1 }, Span { gpa: 0x10_0000, len: 0x1000 });
    for reaching in [vec![missed], vec![wanted, missed], vec![missed; 100]] {
        let error = attach(&reaching).map(drop).unwrap_err();
        assert!(
            matches!(error, ClientError::Refused { refusal: Refusal::Invalid, .. }),
            "{error:?}"
        );
        let words = "range 0x100000..0x101000 holds no memory that the token opens, which is at 0x101000..0x102000";
        assert!(error.to_string().contains(words), "{error}");
    }
    let listed = &broker.grants()[0];
    assert_eq!((listed.uses_left, listed.views.len()), (1, 0));
    // What is after the first 64 is the process's to find out.
    let mut reaching = vec![wanted; 64];
    reaching.push(missed);
    attach(&reaching).unwrap();
    assert_eq!(broker.grants()[0].uses_left, 0);
}

#[test]
fn a_revoked_process_is_waited_for_until_it_confirms() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let granted = broker.grant(&GrantRequest { uses: 2, ..request(Rights::ReadOnly) });
    let (mut link, _view) = attach(&broker, &granted.token);
    let (mut other, _other_view) = attach(&broker, &granted.token);
    assert_eq!(link.wait(Duration::ZERO).unwrap(), None);
    let revoked = std::thread::scope(|scope| {
        let revoking = scope.spawn(|| broker.admin().revoke(granted.grant).unwrap());
        let mut ready = [PollFd::new(&link, PollFlags::IN)];
        poll(&mut ready, Some(&Timespec { tv_sec: 5, tv_nsec: 0 })).unwrap();
        assert_eq!(link.wait(SOON).unwrap(), Some(HostEvent::Revoked));
        assert_eq!(other.wait(SOON).unwrap(), Some(HostEvent::Revoked));
        assert!(!revoking.is_finished());
        link.confirm();
        link.confirm();
        // One that is closed has confirmed as well.
        drop(other);
        revoking.join().unwrap()
    });
    assert_eq!((revoked.views, revoked.unconfirmed), (2, 0));
    assert!(matches!(link.wait(SOON), Err(ClientError::Ended)));
    assert!(broker.grants()[0].views.is_empty());
}

#[test]
fn a_process_that_does_not_confirm_is_counted() {
    let broker = TestBroker::start_with(short_confirmation());
    let _tiger = broker.target("tiger");
    let granted = broker.grant(&request(Rights::ReadOnly));
    let (_link, _view) = attach(&broker, &granted.token);
    assert_eq!(broker.admin().revoke(granted.grant).unwrap().unconfirmed, 1);
}

#[test]
fn a_process_hears_of_changes_and_of_the_end() {
    let broker = TestBroker::start();
    let tiger = broker.target("tiger");
    let spans = Some(vec![Span { gpa: 0x3000, len: 0x10_0000 }]);
    let granted = broker.grant(&GrantRequest { spans, uses: 2, ..request(Rights::ReadOnly) });
    let (mut link, view) = attach(&broker, &granted.token);
    tiger.ram_changed(
        vec![Region { gpa: 0x2000, len: 0x2000, offset: 0, file: 0 }],
        Change::Resized,
    );
    let now = vec![Region { gpa: 0x3000, len: 0x1000, offset: 0x1000, file: 0 }];
    assert_eq!(
        link.wait(SOON).unwrap(),
        Some(HostEvent::Changed { generation: view.generation + 1, regions: now })
    );
    drop(tiger);
    assert_eq!(link.wait(SOON).unwrap(), Some(HostEvent::Gone));
    assert!(matches!(link.wait(SOON), Err(ClientError::Ended)));

    let _tiger = broker.target("tiger");
    let granted = broker.grant(&request(Rights::ReadOnly));
    let (mut link, _view) = attach(&broker, &granted.token);
    drop(broker);
    assert_eq!(link.wait(SOON).unwrap(), Some(HostEvent::Gone));
}

#[test]
fn waiting_ends_in_time_and_a_silent_process_keeps_its_view() {
    // Longer than a slow machine takes from connecting to the first request.
    let silence = Duration::from_secs(10);
    let broker = TestBroker::start_with(Limits { silence, ..Limits::default() });
    let _tiger = broker.target("tiger");
    let granted = broker.grant(&request(Rights::ReadOnly));
    let (mut link, _view) = attach(&broker, &granted.token);
    let began = Instant::now();
    assert_eq!(link.wait(Duration::from_millis(50)).unwrap(), None);
    assert!(began.elapsed() >= Duration::from_millis(50));
    // Longer than a connection without a view may be silent.
    assert_eq!(link.wait(silence + silence / 2).unwrap(), None);
    assert_eq!(broker.grants()[0].views.len(), 1);
    let _ = link.as_fd();
}

#[test]
fn a_race_of_attaching_and_revoking_leaves_no_view() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    for _ in 0..30 {
        let granted = broker.grant(&GrantRequest { uses: 1000, ..request(Rights::ReadOnly) });
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    // A view that opens is revoked, sooner or later.
                    while let Ok((mut link, _view)) =
                        HostLink::attach(&broker.path, &granted.token, true)
                    {
                        if link.wait(Duration::from_millis(1)).is_ok_and(|event| event.is_some()) {
                            link.confirm();
                        }
                    }
                });
            }
            let revoked = broker.admin().revoke(granted.grant).unwrap();
            assert_eq!(revoked.unconfirmed, 0);
        });
    }
    wait_for("every view to end", || broker.state.grant_count().1 == 0);
}

/// The generation of `tiger`'s RAM, as a view tells it.
fn generation(broker: &TestBroker) -> u64 {
    let granted = broker.grant(&request(Rights::ReadOnly));
    attach(broker, &granted.token).1.generation
}

#[test]
fn the_same_memory_has_the_same_generation_by_the_next_broker() {
    let broker = TestBroker::start();
    let tiger = broker.target("tiger");
    let first = generation(&broker);
    assert_eq!(generation(&broker), first);
    let next = |broker: TestBroker| {
        let directory = broker.stop();
        wait_for("the link to notice", || !tiger.is_connected());
        TestBroker::start_in(directory)
    };
    let broker = next(broker);
    wait_for("the generation of before", || tiger.is_connected() && generation(&broker) == first);
    tiger.ram_changed(regions(), Change::Reset);
    wait_for("the reset", || generation(&broker) == first + 1);
    let directory = broker.stop();
    wait_for("the link to notice", || !tiger.is_connected());
    // This change is not reported.
    tiger.ram_changed(regions(), Change::Reset);
    let broker = TestBroker::start_in(directory);
    wait_for("both resets to count", || tiger.is_connected() && generation(&broker) == first + 2);
    // Started again, it is another one.
    drop(tiger);
    wait_for("it to be gone", || broker.admin().targets().unwrap().is_empty());
    let _tiger = broker.target("tiger");
    assert!(![first, first + 1, first + 2].contains(&generation(&broker)));
}

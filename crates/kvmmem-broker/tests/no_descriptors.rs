// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A broker and VMMs that have no file descriptors left. Alone in its program: it leaves none to
//! other programs' tests; its own run one after the other.

mod common;

use std::fs::File;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvmmem::host::HostLink;
use kvmmem_kvmi::token::Token;
use kvmmem_proto::message::{Answer, Call, FromBroker, Refusal, Request};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use common::{PATIENCE, TestBroker, caller, request, wait_for};
use kvmmem_client::admin::GrantRequest;
use kvmmem_client::vmm::{RedeemError, Rights};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes all file descriptors that this process may have.
fn take_all() -> Vec<File> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(256), maximum }).unwrap();
    std::iter::from_fn(|| File::open("/dev/null").ok()).take(256).collect()
}

fn attach(socket: &PacketSocket, token: &Token) -> FromBroker {
    let call = Call::Attach {
        token: token.clone(),
        caller: caller(),
        read_only: false,
        reaching: Vec::new(),
    };
    socket.send(&Request { id: 1, call }, &[], Wait::Limited).unwrap();
    socket.receive(&mut PacketBuffer::default()).unwrap().unwrap().0
}

#[test]
fn a_token_keeps_its_use_where_the_view_cannot_be_given() {
    let _alone = alone();
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    // What the broker closes late would leave it a descriptor: no connection ends meanwhile.
    let (mut admin, mut kept) = (broker.admin(), Vec::new());
    for rights in [Rights::ReadOnly, Rights::ReadWrite] {
        let granted = admin.grant(&request(rights)).unwrap();
        let socket = PacketSocket::connect(&broker.path, PATIENCE).unwrap();
        socket.limit_receive(Some(Duration::from_secs(60))).unwrap();
        socket
            .send(&Request { id: 0, call: Call::Targets { after: 0 } }, &[], Wait::Limited)
            .unwrap();
        let _: FromBroker = socket.receive(&mut PacketBuffer::default()).unwrap().unwrap().0;
        let taken = take_all();
        let refused = attach(&socket, &granted.token);
        drop(taken);
        assert!(
            matches!(&refused, FromBroker::Refused { refusal: Refusal::Limit, message, .. } if message.contains("RAM")),
            "{refused:?}"
        );
        let attached = attach(&socket, &granted.token);
        assert!(
            matches!(attached, FromBroker::Answer { answer: Answer::HostAttached { .. }, .. }),
            "{attached:?}"
        );
        // It was the only one.
        let other = PacketSocket::connect(&broker.path, PATIENCE).unwrap();
        other.limit_receive(Some(Duration::from_secs(60))).unwrap();
        let again = attach(&other, &granted.token);
        kept.extend([socket, other]);
        assert!(
            matches!(again, FromBroker::Refused { refusal: Refusal::Unknown, .. }),
            "{again:?}"
        );
    }
}

/// What [`tool_with_few_descriptors`] is told.
const TOOL: [&str; 3] = ["KVMMEM_TEST_SOCKET", "KVMMEM_TEST_TOKEN", "KVMMEM_TEST_LEFT"];

#[test]
fn a_tool_without_descriptors_uses_no_token() {
    let _alone = alone();
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let uses = 25;
    let granted = broker.grant(&GrantRequest { uses, ..request(Rights::ReadOnly) });
    let mut attached = 0;
    for left in 0..uses {
        let [socket, token, few] = TOOL;
        let mut tool = Command::new(std::env::current_exe().unwrap());
        tool.args(["--exact", "tool_with_few_descriptors", "--ignored"]);
        tool.env(socket, &broker.path)
            .env(token, &*granted.token.to_hex())
            .env(few, left.to_string());
        attached += u32::from(tool.output().unwrap().status.success());
        wait_for(&format!("the use to be returned with {left} descriptors"), || {
            broker.grants()[0].uses_left == uses - attached
        });
    }
    assert!(0 < attached && attached < uses, "{attached}");
}

#[test]
#[ignore = "the tool of the test above, in a process of its own"]
fn tool_with_few_descriptors() {
    let [Ok(socket), Ok(token), Ok(left)] = TOOL.map(std::env::var) else { return };
    let mut taken = take_all();
    taken.truncate(taken.len() - left.parse::<usize>().unwrap());
    drop(HostLink::attach(socket.as_ref(), &token.parse().unwrap(), true).unwrap());
}

/// The target's files come to a VMM with its first view or page of that target.
#[test]
fn a_token_keeps_its_use_where_the_files_do_not_arrive() {
    let _alone = alone();
    let broker = TestBroker::start();
    let (_tiger, _puma) = (broker.target("tiger"), broker.target("puma"));
    let (lion, _views) = broker.viewer("lion", 3, Duration::ZERO);
    let mut admin = broker.admin();
    let puma = GrantRequest { target: "puma".into(), ..request(Rights::ReadOnly) };
    let kept = lion.attach(&admin.grant(&puma).unwrap().token, &caller(), true).unwrap();
    let view = admin.grant(&request(Rights::ReadOnly)).unwrap();
    let page = admin.grant(&request(Rights::ReadWrite)).unwrap();

    let taken = take_all();
    let no_view = lion.attach(&view.token, &caller(), true);
    let no_page = lion.redeem(&page.token);
    let is_kept = lion.current(kept.view).is_some();
    drop(taken);
    assert_eq!(no_view.unwrap_err(), RedeemError::NoDescriptors);
    assert_eq!(no_page.unwrap_err(), RedeemError::NoDescriptors);
    assert!(is_kept, "the VMM has lost its connection");
    wait_for("the uses to be returned", || {
        admin.grants().unwrap().iter().filter(|grant| grant.uses_left == 1).count() == 2
    });
    assert_eq!(admin.grants().unwrap().iter().flat_map(|grant| &grant.views).count(), 1);

    let attached = lion.attach(&view.token, &caller(), true).unwrap();
    assert!(attached.target.file(0).is_some());
    lion.redeem(&page.token).unwrap();
    for token in [&view.token, &page.token] {
        assert_eq!(lion.attach(token, &caller(), true).unwrap_err(), RedeemError::Unknown);
        assert_eq!(lion.redeem(token).unwrap_err(), RedeemError::Unknown);
    }
    // Both are revoked as ever.
    for (grant, views) in [(view.grant, 1), (page.grant, 0)] {
        let revoked = admin.revoke(grant).unwrap();
        assert_eq!((revoked.views, revoked.unconfirmed), (views, 0));
    }
    assert!(lion.current(attached.view).is_none() && lion.current(kept.view).is_some());
}

/// A token of KVMI's is pushed to its VMM, with the target's files before it.
#[test]
fn a_target_is_pushed_again_where_its_files_did_not_arrive() {
    let _alone = alone();
    let broker = TestBroker::start();
    let (_tiger, _puma) = (broker.target("tiger"), broker.target("puma"));
    let lion = broker.introspector("lion", 3);
    let mut admin = broker.admin();
    let vms = admin.targets().unwrap();
    let number = |name| vms.iter().find(|vm| vm.identity.name == name).unwrap().id;
    let mint = || broker.service.mint_token(number("tiger"), Some(number("lion"))).unwrap();
    let puma = GrantRequest { target: "puma".into(), ..request(Rights::ReadOnly) };
    let kept = lion.attach(&admin.grant(&puma).unwrap().token, &caller(), true).unwrap();

    let taken = take_all();
    let claimed = lion.redeem(&mint());
    drop(taken);
    assert!(claimed.is_err());
    wait_for("a token that can be used", || lion.redeem(&mint()).is_ok());
    assert!(lion.current(kept.view).is_some(), "the VMM has lost its connection");
}

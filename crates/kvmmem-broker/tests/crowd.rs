// SPDX-License-Identifier: Apache-2.0 OR MIT
//! 1,000 targets at once. Alone in its program: it counts what the whole process has.

mod common;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use kvmmem_client::admin::{GrantRequest, Rights};
use kvmmem_proto::message::{Answer, Call, FromBroker, Request};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};

use common::{PATIENCE, TestBroker, may_open, ram, request, target, wait_for};
use kvmmem::host::HostLink;

const COUNT: usize = 1_000;

#[test]
fn a_thousand_targets_come_are_looked_at_and_go() {
    if !may_open(4 * COUNT) {
        return;
    }
    let broker = TestBroker::start();
    let before = threads_and_files();
    let mut buffer = PacketBuffer::default();
    let mut targets = Vec::new();
    for number in 0..COUNT {
        let socket = PacketSocket::connect(&broker.path, PATIENCE).unwrap();
        socket.limit_receive(Some(PATIENCE)).unwrap();
        let call = Call::Register(target(&format!("{number:04}")));
        socket.send(&Request { id: 1, call }, &[ram().as_fd()], Wait::Limited).unwrap();
        let (answer, _) = socket.receive(&mut buffer).unwrap().unwrap();
        assert!(
            matches!(answer, FromBroker::Answer { answer: Answer::Registered { .. }, .. }),
            "{number}: {answer:?}"
        );
        targets.push(socket);
    }

    let listed = broker.admin().targets().unwrap();
    let names: BTreeSet<_> = listed.iter().map(|target| target.identity.name.as_str()).collect();
    assert_eq!((listed.len(), names.len()), (COUNT, COUNT));
    let mut admin = broker.admin();
    let mut views = Vec::new();
    for name in names {
        let request = GrantRequest { target: name.into(), uses: 2, ..request(Rights::ReadOnly) };
        let token = admin.grant(&request).unwrap().token;
        if name.ends_with('7') {
            views.push(HostLink::attach(&broker.path, &token, true).unwrap().0);
        }
    }
    assert_eq!(broker.state.grant_count(), (COUNT, COUNT / 10));

    // One half goes with its VMMs, the other with the broker.
    targets.truncate(COUNT / 2);
    wait_for("half of the targets to go", || broker.state.grant_count() == (COUNT / 2, COUNT / 20));
    assert_eq!(broker.admin().targets().unwrap().len(), COUNT / 2);
    drop((admin, views));
    let state = Arc::downgrade(&broker.state);
    drop(broker);
    drop(targets);
    wait_for("the broker to go", || state.strong_count() == 0);
    // Its own thread and its socket have gone as well.
    wait_for("threads and files to go", || {
        let after = threads_and_files();
        after.0 < before.0 && after.1 < before.1
    });
}

fn threads_and_files() -> (usize, usize) {
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    (count("task"), count("fd"))
}

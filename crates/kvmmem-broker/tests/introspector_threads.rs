// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an introspector costs. Alone in its program: it counts what the whole process has.

mod common;

use std::collections::BTreeMap;

use kvmmem_client::admin::{GrantRequest, IntrospectorRequest, OnSilence, Rights};

use common::fake_qmp::FakeQemu;
use common::{TestBroker, caller, request, wait_for};

/// How many introspectors.
const COUNT: u32 = 3;

/// Context id of the first one.
const CID: u32 = 200;

/// Threads that are there without an introspector: those of connections, of VMMs, and of pools with
/// a fixed size.
const OTHERS: [&str; 11] = [
    "reactor",
    "audit",
    "close",
    "peer",
    "vmm-watch",
    "service",
    "session",
    "guest",
    "broker-link",
    "broker-events",
    // Ends as soon as a connection is made.
    "socket-lookup",
];

/// The name of each thread.
fn names() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // One may end meanwhile.
    let comm = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
    tasks.filter_map(|task| comm(task.unwrap())).map(|name| name.trim().to_owned()).collect()
}

/// How many threads there are of each other name; `own` are the test's.
fn threads(own: &[String]) -> BTreeMap<String, usize> {
    let mut threads = BTreeMap::new();
    for name in names() {
        if !own.contains(&name) && !OTHERS.contains(&&*name) {
            *threads.entry(name).or_default() += 1;
        }
    }
    threads
}

#[test]
fn an_introspector_costs_one_thread() {
    let broker = TestBroker::start();
    broker.service.set_guest_port(None);
    let qemus: Vec<FakeQemu> = (0..COUNT).map(|_| FakeQemu::start()).collect();
    // The threads of fakes have the name of the one that has started them.
    let own = names();
    let threads = || threads(&own);
    for (cid, qemu) in (CID..).zip(&qemus) {
        let (which, name) = (qemu.which(), Some(format!("lion-{cid}")));
        let (cid, on_silence) = (Some(cid), OnSilence::Report);
        let request = IntrospectorRequest { which, cid, name, on_silence, trusted: false };
        broker.admin().add_introspector(&request).unwrap();
    }
    let expected = BTreeMap::from([("introspector".to_owned(), COUNT as usize)]);
    // A thread gives itself its name.
    wait_for("the threads", || threads() == expected);
    // No more while there are views, and while they end.
    let _tiger = broker.target("tiger");
    let request = GrantRequest { uses: COUNT, ..request(Rights::ReadOnly) };
    let token = broker.grant(&request).token;
    let open = |cid: u32| {
        broker.service.introspector(cid).unwrap().open(
            &token,
            &caller(),
            true,
            kvmmem_proto::guest::MappedBy::Module,
        )
    };
    let views: Vec<_> = (CID..CID + COUNT).map(|cid| open(cid).unwrap()).collect();
    assert_eq!(threads(), expected);
    qemus.iter().for_each(|qemu| qemu.machine().is_stubborn = true);
    drop(views);
    assert_eq!(threads(), expected);
    for cid in CID..CID + COUNT {
        broker.admin().remove_introspector(&format!("lion-{cid}")).unwrap();
    }
    wait_for("the threads to end", || threads().is_empty());
}

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

/// How many threads there are of each name that is an introspector's or a QMP connection's.
fn threads() -> BTreeMap<String, usize> {
    let mut threads = BTreeMap::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        // It may have ended meanwhile.
        let name = std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default();
        if name.trim() == "introspector"
            || ["introspector-", "qmp-"].iter().any(|prefix| name.starts_with(prefix))
        {
            *threads.entry(name.trim().to_owned()).or_default() += 1;
        }
    }
    threads
}

#[test]
fn an_introspector_costs_one_thread() {
    let broker = TestBroker::start();
    broker.service.set_guest_port(None);
    let qemus: Vec<FakeQemu> = (0..COUNT).map(|_| FakeQemu::start()).collect();
    assert_eq!(threads(), BTreeMap::new());
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

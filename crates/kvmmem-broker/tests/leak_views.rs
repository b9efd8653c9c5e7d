// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views leave nothing behind, however they end. Alone in its program: it counts what the whole
//! process has.

mod common;

use std::time::Duration;

use kvmmem_client::admin::GrantRequest;
use kvmmem_client::vmm::{Rights, ViewCounters};

use common::{TestBroker, request, wait_for};
use kvmmem::host::HostLink;

fn count(what: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count()
}

#[test]
fn a_thousand_attaches_leave_no_descriptor_no_thread_and_no_view() {
    let broker = TestBroker::start();
    let tiger = broker.target("tiger");
    let (lion, views) = broker.viewer("lion", 7, Duration::ZERO);
    let mut admin = broker.admin();
    let mut before = None;
    for round in 0..1000u32 {
        if round == 50 {
            wait_for("the first views to end", || broker.state.grant_count().1 == 0);
            before = Some((count("fd"), count("task")));
        }
        let granted = admin.grant(&GrantRequest { uses: 2, ..request(Rights::ReadOnly) }).unwrap();
        let view = views.open(&lion, &granted.token).unwrap();
        let host =
            (round % 4 == 0).then(|| HostLink::attach(&broker.path, &granted.token, true).unwrap());
        match round % 3 {
            0 => {
                drop(host);
                lion.detached(view.view, ViewCounters::default());
                views.open.lock().unwrap().clear();
            }
            1 => {
                drop(host);
                assert_eq!(admin.revoke(granted.grant).unwrap().unconfirmed, 0);
            }
            _ => {
                lion.detached(view.view, ViewCounters::default());
                views.open.lock().unwrap().clear();
                drop(host);
            }
        }
        assert_eq!(views.count(), 0);
    }
    let before = before.unwrap();
    wait_for("the last views to end", || broker.state.grant_count().1 == 0);
    wait_for("the last round to end", || (count("fd"), count("task")) <= before);
    assert!(count("fd") <= before.0 && count("task") <= before.1);
    // Grants that were never revoked and can still be used go with their target.
    assert!(broker.state.grant_count().0 > 0);
    drop(tiger);
    wait_for("the grants to go", || broker.state.grant_count() == (0, 0));
}

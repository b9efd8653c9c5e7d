// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Nothing is left behind, in any order of ends. Alone in its program: it counts what the whole
//! process has.

mod common;

use kvmmem_proto::endpoint::Endpoint;

use common::{TestBroker, Tool, wait_for};

fn count(what: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count()
}

#[test]
fn two_hundred_rounds_leave_no_descriptor_and_no_thread() {
    let broker = TestBroker::start();
    let tool = Tool::listen(&broker, "tool.sock");
    let mut admin = broker.admin();
    let mut before = None;
    for round in 0..200 {
        if round == 10 {
            before = Some((count("fd"), count("task")));
        }
        let tiger = broker.target("tiger");
        let lion = broker.introspector("lion", 7);
        admin.hook("tiger", &tool.endpoint).unwrap();
        admin.hook("tiger", &Endpoint::Unix("/nowhere/at/all".into())).unwrap();
        let mut session = tool.accept();
        let bearer = session.token().unwrap();
        let vm = broker.state.number("tiger").unwrap();
        let pushed = broker.mint(vm, 7).unwrap();
        let held = (round % 2 == 0)
            .then(|| (lion.redeem(&bearer).unwrap(), lion.redeem(&pushed).unwrap()));
        match round % 4 {
            0 | 1 => {
                drop(tiger);
                drop(lion);
            }
            2 => {
                drop(lion);
                drop(tiger);
            }
            _ => {
                drop(session);
                drop(tiger);
                drop(lion);
            }
        }
        drop(held);
        wait_for("both VMs to go", || {
            broker.state.number("tiger").is_none() && broker.state.number("lion").is_none()
        });
        // A hook connects again after the tool has closed, so that the next round could accept what
        // this one left.
        wait_for("the hooks to end", || broker.state.hook_count() == 0);
        tool.close_waiting();
    }
    let before = before.unwrap();
    wait_for("the last round to end", || (count("fd"), count("task")) <= before);
    assert!(count("fd") <= before.0 && count("task") <= before.1);
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the next broker knows.

use kvmmem::host::HostLink;
use kvmmem_client::admin::{Rights, Which};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::common::{TestBroker, request, wait_for};
use crate::fake::{Fake, HONEST};

/// The next broker, on the same folder and with the same memory.
fn next(broker: TestBroker) -> TestBroker {
    let state = broker.directory.path().join("state");
    let next = TestBroker::start_in(broker.stop());
    next.service.remember_in(&state).unwrap();
    next
}

fn names(broker: &TestBroker) -> Vec<String> {
    broker.admin().targets().unwrap().into_iter().map(|target| target.identity.name).collect()
}

fn uuid_of(broker: &TestBroker, name: &str) -> Uuid {
    let targets = broker.admin().targets().unwrap();
    targets.into_iter().find(|vm| vm.identity.name == name).unwrap().identity.uuid
}

fn remembered(broker: &TestBroker) -> Value {
    let text = std::fs::read_to_string(broker.directory.path().join("state/added.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["vms"].take()
}

#[test]
fn the_next_broker_knows_what_was_added_and_still_runs() {
    let broker = TestBroker::start();
    broker.service.remember_in(&broker.directory.path().join("state")).unwrap();
    let [stays, mut ends, removed] = ["stays", "ends", "removed"].map(|name| {
        let fake = Fake::start("sealed tables", HONEST);
        broker.admin().add_target(&Which::Pid(fake.pid()), Some(name)).unwrap();
        fake
    });
    // One that registers itself is its own business.
    let own = broker.target("own");
    broker.admin().remove_target("removed").unwrap();
    let uuid = uuid_of(&broker, "stays");
    assert_eq!(remembered(&broker).as_array().unwrap().len(), 2);
    drop(own);

    // A VM that ends is forgotten, also before the next broker starts.
    let broker = next(broker);
    wait_for("two targets", || names(&broker).len() == 2);
    assert_eq!(uuid_of(&broker, "stays"), uuid);
    let state = broker.directory.path().join("state");
    let directory = broker.stop();
    ends.end();
    let broker = TestBroker::start_in(directory);
    broker.service.remember_in(&state).unwrap();
    wait_for("the one that still runs", || names(&broker) == ["stays"]);
    wait_for("the other to be forgotten", || remembered(&broker).as_array().unwrap().len() == 1);
    drop(stays);
    wait_for("nothing to be left", || {
        names(&broker).is_empty() && remembered(&broker) == json!([])
    });
    drop(removed);
}

#[test]
fn a_process_id_that_is_somebody_elses_now_is_not_taken_for_it() {
    let broker = TestBroker::start();
    broker.service.remember_in(&broker.directory.path().join("state")).unwrap();
    let fake = Fake::start("sealed tables", HONEST);
    broker.admin().add_target(&Which::Pid(fake.pid()), Some("was")).unwrap();
    let path = broker.directory.path().join("state/added.json");
    let directory = broker.stop();
    let text = std::fs::read_to_string(&path).unwrap();
    let mut content: Value = serde_json::from_str(&text).unwrap();
    let vm = content["vms"][0].take();
    let started = vm["started"].as_u64().unwrap() + 1;
    let inode = vm["role"]["target"]["files"][0]["inode"].as_u64().unwrap() + 1;
    let (mut other, mut files) = (vm.clone(), vm);
    other["started"] = started.into();
    files["role"]["target"]["files"][0]["inode"] = inode.into();
    content["vms"] = json!([other, files]);
    std::fs::write(&path, content.to_string()).unwrap();
    let broker = TestBroker::start_in(directory);
    let log = broker.directory.path().join("audit.log");
    broker.state.write_audit_to(&log).unwrap();
    broker.service.remember_in(path.parent().unwrap()).unwrap();
    wait_for("both to be forgotten", || remembered(&broker) == json!([]));
    assert_eq!(names(&broker), [""; 0]);
    // Not even for a moment.
    assert_eq!(std::fs::read_to_string(log).unwrap(), "");
}

#[test]
fn memory_keeps_its_generation_over_removal_and_the_next_broker() {
    let broker = TestBroker::start();
    broker.service.remember_in(&broker.directory.path().join("state")).unwrap();
    let fake = Fake::start("sealed tables", HONEST);
    let add = |broker: &TestBroker| {
        broker.admin().add_target(&Which::Pid(fake.pid()), Some("tiger")).unwrap();
        generation(broker)
    };
    let first = add(&broker);
    let vm = broker.state.number("tiger").unwrap();
    let regions = broker.state.layout(vm).unwrap().map.regions().to_vec();
    broker.state.move_ram(vm, regions).unwrap();
    assert_eq!(generation(&broker), first + 1);
    broker.admin().remove_target("tiger").unwrap();
    assert_eq!(add(&broker), first + 1);
    let broker = next(broker);
    wait_for("the target", || names(&broker) == ["tiger"]);
    assert_eq!(generation(&broker), first + 1);
    // Another process with the same name is another target.
    broker.admin().remove_target("tiger").unwrap();
    let other = Fake::start("sealed tables", HONEST);
    broker.admin().add_target(&Which::Pid(other.pid()), Some("tiger")).unwrap();
    assert!(![first, first + 1].contains(&generation(&broker)));
}

/// The generation of `tiger`'s RAM, as a view tells it.
fn generation(broker: &TestBroker) -> u64 {
    let granted = broker.grant(&request(Rights::ReadOnly));
    HostLink::attach(&broker.path, &granted.token, true).unwrap().1.generation
}

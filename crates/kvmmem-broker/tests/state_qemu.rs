// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A target and an introspector under the stock QEMU of this machine, and two brokers, one after
//! the other.

mod common;

use kvmmem_client::admin::{IntrospectorRequest, OnSilence};

use common::TestBroker;
use common::qemu::{Qemu, wait_long};

#[test]
fn the_next_broker_has_the_vms_under_qemu_again() {
    let broker = TestBroker::start();
    let state = broker.directory.path().join("state");
    broker.service.remember_in(&state).unwrap();
    broker.service.set_guest_port(None);
    let Some(target) = Qemu::shared(&broker, "tiger", "q35", "64M") else { return };
    let Some(watcher) = Qemu::start(&broker, "watcher", &["-machine", "pc", "-m", "64"]) else {
        return;
    };
    let uuid = broker.admin().add_target(&target.socket(), None).unwrap().target.identity.uuid;
    let request = IntrospectorRequest {
        which: watcher.socket(),
        cid: Some(77),
        name: Some("lion".into()),
        on_silence: OnSilence::Pause,
        trusted: true,
    };
    let lion = broker.admin().add_introspector(&request).unwrap().target;

    let broker = TestBroker::start_in(broker.stop());
    broker.service.set_guest_port(None);
    broker.service.remember_in(&state).unwrap();
    wait_long("both to be there again", || broker.admin().targets().unwrap().len() == 2);
    let mut targets = broker.admin().targets().unwrap();
    targets.sort_by(|one, other| one.identity.name.cmp(&other.identity.name));
    let vms = targets.into_iter().map(|target| target.identity);
    let seen: Vec<_> = vms.map(|vm| (vm.name, vm.uuid, vm.introspector, vm.cid)).collect();
    assert_eq!(
        seen,
        [("lion".into(), lion.identity.uuid, true, Some(77)), ("tiger".into(), uuid, false, None)]
    );
    // It is registered first.
    wait_long("the introspector", || broker.service.introspector(77).is_some());
    // Both are watched again.
    drop((target, watcher));
    wait_long("both to go", || broker.admin().targets().unwrap().is_empty());
    wait_long("both to be forgotten", || {
        std::fs::read_to_string(state.join("added.json")).unwrap().contains("\"vms\":[]")
    });
}

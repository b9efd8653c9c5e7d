// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VM under the stock QEMU of this machine that is target and introspector, by one QMP socket:
//! QEMU serves one client at a time.

mod common;

use kvmmem_client::admin::{IntrospectorRequest, OnSilence, Rights};
use kvmmem_qemu::qmp::Qmp;
use serde_json::json;

use common::qemu::{Qemu, wait_long};
use common::{PATIENCE, TestBroker, request};
use kvmmem::host::{HostEvent, HostLink};
use kvmmem_client::admin::GrantRequest;

/// The introspector's context id.
const CID: u32 = 79;

fn add_target(broker: &TestBroker, qemu: &Qemu) {
    broker.admin().add_target(&qemu.socket(), Some("seen")).unwrap();
}

fn add_introspector(broker: &TestBroker, qemu: &Qemu) {
    let (which, name) = (qemu.socket(), Some("sees".into()));
    let (cid, on_silence, trusted) = (Some(CID), OnSilence::Report, false);
    let request = IntrospectorRequest { which, cid, name, on_silence, trusted };
    broker.admin().add_introspector(&request).unwrap();
}

/// Whether QEMU answers the introspector.
fn assert_introspector(broker: &TestBroker) {
    assert!(broker.service.introspector(CID).is_some());
    assert!(broker.admin().free_slots("sees").unwrap().free > 0);
}

/// Whether the target's resets are reported.
fn assert_target(broker: &TestBroker, qemu: &Qemu) {
    let request = GrantRequest { target: "seen".into(), ..request(Rights::ReadOnly) };
    let token = broker.grant(&request).token;
    let (mut link, _view) = HostLink::attach(&broker.path, &token, true).unwrap();
    qemu.monitor().execute("system_reset", json!({}));
    let event = link.wait(PATIENCE).unwrap();
    assert!(matches!(event, Some(HostEvent::Changed { .. })), "{event:?}");
}

#[test]
fn a_vm_in_both_roles_has_one_qmp_connection() {
    let broker = TestBroker::start();
    broker.service.set_guest_port(None);
    let Some(qemu) = Qemu::shared(&broker, "both", "pc", "64M") else { return };
    for target_first in [true, false] {
        if target_first {
            add_target(&broker, &qemu);
            add_introspector(&broker, &qemu);
        } else {
            add_introspector(&broker, &qemu);
            add_target(&broker, &qemu);
        }
        assert_introspector(&broker);
        assert_target(&broker, &qemu);
        // The connection is the other's, whichever goes first.
        if target_first {
            broker.admin().remove_target("seen").unwrap();
            assert_introspector(&broker);
            broker.admin().remove_introspector("sees").unwrap();
        } else {
            broker.admin().remove_introspector("sees").unwrap();
            assert_target(&broker, &qemu);
            broker.admin().remove_target("seen").unwrap();
        }
        wait_long("another client to be served", || Qmp::connect(&qemu.qmp).is_ok());
    }
}

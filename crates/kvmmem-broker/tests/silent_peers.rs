// SPDX-License-Identifier: Apache-2.0 OR MIT
//! As many silent peers as the broker serves. Alone in its program: their threads hold up those of
//! other tests.

mod common;

use std::time::Duration;

use kvmmem_client::admin::Admin;
use kvmmem_proto::message::{FromBroker, Refusal};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket};

use common::{TestBroker, may_open, wait_for};
use kvmmem_broker::Limits;

#[test]
fn silent_connections_run_out_and_come_back() {
    let most = Limits::default().connections.total;
    if !may_open(3 * most) {
        return;
    }
    let broker = TestBroker::start();
    let connect = || PacketSocket::connect(&broker.path, Duration::from_secs(60)).unwrap();
    let silent: Vec<PacketSocket> = (0..most).map(|_| connect()).collect();
    let one_more = connect();
    one_more.limit_receive(Some(Duration::from_secs(60))).unwrap();
    let (answer, _) =
        one_more.receive::<FromBroker>(&mut PacketBuffer::default()).unwrap().unwrap();
    assert!(matches!(answer, FromBroker::Refused { refusal: Refusal::Limit, .. }), "{answer:?}");
    drop(silent);
    wait_for("connections to be served again", || {
        Admin::connect(&broker.path).is_ok_and(|mut admin| admin.targets().is_ok())
    });
    drop(broker.target("good"));
}

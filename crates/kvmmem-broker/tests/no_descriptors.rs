// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A broker that has no file descriptors left. Alone in its program: it leaves none to other tests.

mod common;

use std::fs::File;
use std::time::Duration;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::message::{Answer, Call, FromBroker, Refusal, Request};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use common::{PATIENCE, TestBroker, caller, request};
use kvmmem_client::vmm::Rights;

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
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(256), maximum }).unwrap();
        let taken: Vec<File> =
            std::iter::from_fn(|| File::open("/dev/null").ok()).take(256).collect();
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

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Places of channels, and a target that ends.

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Call, Caller, NewGrant};
use kvmmem_proto::packet::{PacketSocket, Wait};

use super::*;
use crate::core::limits::Limits;
use crate::core::quota::Bound;
use crate::service::Service;
use crate::test_peer::{Connection, USER, grant_request, lingering};
use crate::test_wait::wait_for;

#[test]
fn a_channel_counts_until_its_files_are_closed() {
    let channels = Bound { total: 2, per_user: 1, reserve: 0 };
    let broker = Arc::new(Broker::new(Limits { channels, ..Limits::default() }));
    let peer = Arc::new(Peer::unconnected(Credentials { pid: 1, uid: USER }));
    let pair = || {
        let flags = SocketFlags::CLOEXEC;
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    };
    let take = |socket| ChannelSlot::take(&broker, &peer, Arc::new(socket));
    let (ours, theirs) = pair();
    let (file, other_end) = lingering();
    let theirs = PacketSocket::accepted(theirs, Duration::from_secs(60)).unwrap();
    theirs.send(&"a file", &[file.as_fd()], Wait::Limited).unwrap();
    drop(file);
    let slot = take(ours).map_err(|refused| refused.message).unwrap();
    let socket = Arc::downgrade(&slot.socket);
    let closing = std::thread::spawn(move || drop(slot));
    wait_for("its socket to be closed", || socket.strong_count() == 0);
    let refused = take(pair().0).map(drop).map_err(|refused| refused.refusal);
    drop(other_end);
    assert_eq!(refused, Err(Refusal::Limit));
    closing.join().unwrap();
    assert!(take(pair().0).is_ok());
}

#[test]
fn a_target_whose_ram_is_closed_has_ended_and_is_no_hole() {
    let service = Arc::new(Service::new(Limits::default()));
    let [mut tiger, mut viewer] = [(); 2].map(|()| Connection::new(&service, 0));
    tiger.register_target("tiger").unwrap();
    let granted = viewer.ask(Call::Grant(grant_request("tiger")), None);
    let Ok(Answer::Granted(NewGrant { token, .. })) = granted else { panic!("{granted:?}") };
    let caller = Caller { pid: 1, uid: 1, comm: "tool".into() };
    let attach = Call::Attach { token, caller, read_only: true, reaching: vec![] };
    let attached = viewer.ask(attach, None);
    let Ok(Answer::HostAttached { view, .. }) = attached else { panic!("{attached:?}") };
    let broker = service.broker();
    let is_viewer = |peer: &&Arc<Peer>| broker.reached(peer, view).is_some();
    let peers: Vec<_> = broker.tables().peers.values().cloned().collect();
    let peer = peers.iter().find(is_viewer).unwrap();
    assert!(broker.copied(peer, view).is_ok());
    // As at its end, before the view ends.
    broker.find("tiger").unwrap().close_ram();
    let refused = broker.copied(peer, view).map(drop).map_err(|refused| refused.refusal);
    assert_eq!(refused, Err(Refusal::Unknown));
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Places of channels.

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::packet::{PacketSocket, Wait};

use super::*;
use crate::core::limits::Limits;
use crate::core::quota::Bound;
use crate::test_peer::{USER, lingering};
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

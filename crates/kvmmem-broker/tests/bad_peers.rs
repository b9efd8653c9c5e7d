// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Peers that break the rules: each is refused or cut off, and no other peer notices.

mod common;

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use kvmmem_client::ClientError;
use kvmmem_client::vmm::{Region, VmmLink};
use kvmmem_proto::map::MAX_FILES;
use kvmmem_proto::message::{Answer, Call, FromBroker, Refusal, Request};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};

use common::{TestBroker, introspector, memfd, ram, regions, target, wait_for};
use kvmmem_broker::Limits;
use proptest::prelude::*;
use rustix::fs::SealFlags;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketType, connect, recv, sendmsg, socket,
};

/// A socket without any manners.
fn raw(path: &Path) -> OwnedFd {
    let fd = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::sockopt::set_socket_timeout(
        &fd,
        rustix::net::sockopt::Timeout::Recv,
        Some(Duration::from_secs(60)),
    )
    .unwrap();
    connect(&fd, &SocketAddrUnix::new(path).unwrap()).unwrap();
    fd
}

fn send(fd: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    sendmsg(fd, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
}

/// Reads until the broker closes; returns the packets.
fn read_out(fd: &OwnedFd) -> Vec<String> {
    let mut packets = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match recv(fd, &mut *buffer, rustix::net::RecvFlags::empty()) {
            Ok((0, _)) => return packets,
            Ok((count, _)) => packets.push(String::from_utf8(buffer[..count].to_vec()).unwrap()),
            Err(rustix::io::Errno::CONNRESET) => {}
            Err(error) => panic!("the broker did not close: {error}"),
        }
    }
}

/// Checks that a well-behaved peer is served.
fn check(broker: &TestBroker) {
    let before = broker.admin().targets().unwrap().len();
    let link = broker.target("good");
    assert_eq!(broker.admin().targets().unwrap().len(), before + 1);
    drop(link);
    wait_for("the good VM to go", || broker.state.number("good").is_none());
}

#[test]
fn garbage_is_refused_and_closed() {
    let broker = TestBroker::start();
    let large = vec![b'['; 64 * 1024];
    let huge = vec![b' '; 100 * 1024];
    let deep = "[".repeat(5000);
    let packets: [&[u8]; 8] = [
        b"x",
        b"{}",
        b"{\"id\":1}",
        b"{\"id\":-1,\"call\":{\"targets\":{\"after\":0}}}",
        b"{\"id\":1,\"call\":{\"redeem\":{\"token\":\"zz\"}}}",
        deep.as_bytes(),
        &large,
        &huge,
    ];
    for packet in packets {
        let fd = raw(&broker.path);
        send(&fd, packet, &[]).unwrap();
        let said = read_out(&fd);
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains("\"refusal\":\"malformed\""), "{said:?}");
    }
    check(&broker);
}

#[test]
fn unexpected_descriptors_are_closed() {
    let broker = TestBroker::start();
    let peer = raw(&broker.path);
    let list = b"{\"id\":1,\"call\":{\"targets\":{\"after\":0}}}";
    for count in [1, 2, MAX_FILES, MAX_FILES + 1, MAX_FILES + 2, 64, 253] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        if count <= MAX_FILES {
            send(&peer, list, &vec![writer.as_fd(); count]).unwrap();
            let (count, _) = recv(&peer, &mut [0; 4096], rustix::net::RecvFlags::empty()).unwrap();
            assert!(count > 0);
        } else {
            let peer = raw(&broker.path);
            send(&peer, list, &vec![writer.as_fd(); count]).unwrap();
            assert!(read_out(&peer)[0].contains("malformed"));
        }
        // The reader sees the end once the writer is closed everywhere.
        drop(writer);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
    check(&broker);
}

#[test]
fn bad_registrations_are_refused() {
    let broker = TestBroker::start();
    let refused = |registration, ram: Option<OwnedFd>| match VmmLink::connect(
        &broker.path,
        registration,
        ram,
    ) {
        Err(ClientError::Refused { refusal, message }) => {
            assert_eq!(refusal, Refusal::Invalid, "{message}");
            message
        }
        other => panic!("{other:?}"),
    };
    let several = |count: usize| {
        let files: Vec<OwnedFd> = (0..count).map(|_| ram()).collect();
        match VmmLink::connect(&broker.path, target("t"), files) {
            Err(ClientError::Refused { message, .. }) => message,
            other => panic!("{other:?}"),
        }
    };
    assert!(several(2).contains("2 files") && several(MAX_FILES).contains("16 files"));
    let null = || Some(File::open("/dev/null").unwrap().into());
    assert!(refused(target("t"), null()).contains("not a memfd"));
    assert!(refused(target("t"), None).contains("comes with the memfd"));
    assert!(
        refused(target("t"), Some(memfd(0x10_2000, SealFlags::GROW))).contains("F_SEAL_SHRINK")
    );
    assert!(refused(target("t"), Some(memfd(0x10_1000, SealFlags::SHRINK))).contains("0x101000"));
    assert!(refused(introspector("i", 7), Some(ram())).contains("no other does"));
    assert!(refused(introspector("i", 2), None).contains("context id 2"));
    for name in ["", "a\nb", &"x".repeat(64)] {
        assert!(refused(common::target(name), Some(ram())).contains("name"), "{name:?}");
    }
    let with_regions = |regions: Vec<Region>| {
        let mut registration = target("t");
        registration.regions = regions;
        registration
    };
    assert!(refused(with_regions(vec![]), Some(ram())).contains("no region"));
    let file = |file| regions().into_iter().map(|region| Region { file, ..region }).collect();
    assert!(refused(with_regions(file(1)), Some(ram())).contains("its regions name 2"));
    assert!(refused(with_regions(file(u32::MAX)), Some(ram())).contains("file 4294967295"));
    let overlap = [regions(), regions()].concat();
    assert!(refused(with_regions(overlap), Some(ram())).contains("overlaps"));
    let mut vcpus = target("t");
    vcpus.identity.vcpus = 0;
    assert!(refused(vcpus, Some(ram())).contains("vCPUs"));
    check(&broker);
}

#[test]
fn a_connection_registers_one_vm() {
    let broker = TestBroker::start();
    let peer = PacketSocket::connect(&broker.path, Duration::from_secs(60)).unwrap();
    let mut buffer = PacketBuffer::default();
    let mut ask = |id, call, fd: Option<OwnedFd>| {
        peer.send(&Request { id, call }, fd.as_ref().map(AsFd::as_fd).as_slice(), Wait::Limited)
            .unwrap();
        peer.receive::<FromBroker>(&mut buffer).unwrap().unwrap().0
    };
    let first = ask(7, Call::Register(target("a")), Some(ram()));
    assert!(
        matches!(first, FromBroker::Answer { id: 7, answer: Answer::Registered { .. } }),
        "{first:?}"
    );
    let second = ask(8, Call::Register(target("b")), Some(ram()));
    assert!(
        matches!(second, FromBroker::Refused { id: 8, refusal: Refusal::Denied, .. }),
        "{second:?}"
    );
    assert!(broker.state.number("a").is_some());
}

#[test]
fn a_peer_that_does_not_read_is_cut_off_alone() {
    let broker = TestBroker::start();
    let deaf = raw(&broker.path);
    rustix::net::sockopt::set_socket_timeout(
        &deaf,
        rustix::net::sockopt::Timeout::Send,
        Some(Duration::from_secs(12)),
    )
    .unwrap();
    let list = b"{\"id\":1,\"call\":{\"targets\":{\"after\":0}}}";
    let flood = std::thread::spawn(move || {
        (0..1_000_000).take_while(|_| send(&deaf, list, &[]).is_ok()).count()
    });
    for _ in 0..20 {
        check(&broker);
    }
    assert!(flood.join().unwrap() < 1_000_000);
    check(&broker);
}

#[test]
fn a_peer_that_says_nothing_is_cut_off_but_a_vm_may_be_silent() {
    // Longer than a slow machine takes from connecting to the first request.
    let silence = Duration::from_secs(10);
    let broker = TestBroker::start_with(Limits { silence, ..Limits::default() });
    let link = broker.target("quiet");
    let began = Instant::now();
    let silent = raw(&broker.path);
    assert_eq!(read_out(&silent), [""; 0]);
    assert!(began.elapsed() >= silence, "too early");
    assert!(link.is_connected() && broker.state.number("quiet").is_some());
    check(&broker);
}

#[test]
fn guesses_are_slowed_down() {
    let broker = TestBroker::start();
    let lion = broker.introspector("lion", 7);
    let began = Instant::now();
    for n in 0..100 {
        lion.redeem(&kvmmem_client::vmm::Token::new([n, 0, 0, 0])).unwrap_err();
    }
    assert!(began.elapsed() >= Duration::from_millis(99));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_packets_leave_the_broker_well(
        packets in proptest::collection::vec(
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 1..200),
                (any::<u64>(), "redeem|used|targets|hook|unhook|register|attach|detached|counters|revoked_done|ram_changed|grant|grants|revoke|policy|nonsense", any::<u64>(), "[ -~]{0,20}").prop_map(|(id, call, after, text)| {
                    format!("{{\"id\":{id},\"call\":{{{call:?}:{{\"after\":{after},\"view\":{after},\"grant\":{after},\"target\":{text:?},\"token\":{text:?},\"endpoint\":\"unix:/t\"}}}}}}").into_bytes()
                }),
            ],
            1..8,
        ),
    ) {
        let broker = TestBroker::start();
        let fd = raw(&broker.path);
        for packet in &packets {
            if send(&fd, packet, &[]).is_err() {
                break;
            }
        }
        drop(fd);
        check(&broker);
    }
}

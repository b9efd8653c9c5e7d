// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Channels for copies, opened by hand: the packets of [`kvmmem_proto::copy`].

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use kvmmem_client::admin::GrantRequest;
use kvmmem_client::vmm::{Rights, Token};
use kvmmem_proto::copy::{BUFFER, CopyAnswer, CopyRequest, Piece, Status};
use kvmmem_proto::message::{Answer, Call, Caller, FromBroker, Refusal, Request, Unusable};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};
use rustix::fs::{FallocateFlags, SealFlags, fallocate};
use rustix::io::{pread, pwrite};

use common::private::{HIGH, Private, pattern};
use common::{TestBroker, memfd, request, short_confirmation, wait_for};

const SOON: Duration = common::PATIENCE;

/// A connection with a view that copies, by hand.
struct Hand {
    socket: PacketSocket,
    buffer: PacketBuffer,
    view: u64,
}

impl Hand {
    /// Attaches with a new token, and opens a channel.
    fn attach_with_channel(broker: &TestBroker) -> (Self, OwnedFd, Token) {
        let granted = broker.grant(&request(Rights::ReadWrite));
        let mut hand = Self::attach(broker, &granted.token);
        let channel = hand.open(hand.view, &[allocated(BUFFER as u64)]).unwrap();
        (hand, channel, granted.token)
    }

    fn attach(broker: &TestBroker, token: &Token) -> Self {
        let socket = PacketSocket::connect(&broker.path, SOON).unwrap();
        socket.limit_receive(Some(SOON)).unwrap();
        let mut hand = Self { socket, buffer: PacketBuffer::default(), view: 0 };
        let nobody = Caller { pid: 0, uid: 0, comm: String::new() };
        let call = Call::Attach {
            token: token.clone(),
            caller: nobody,
            read_only: false,
            reaching: vec![],
        };
        match hand.ask(call, &[]) {
            FromBroker::Answer {
                answer: Answer::HostAttached { view, copied: true, .. }, ..
            } => {
                hand.view = view;
            }
            other => panic!("{other:?}"),
        }
        hand
    }

    fn ask(&mut self, call: Call, files: &[OwnedFd]) -> FromBroker {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.socket.send(&Request { id: 9, call }, &files, Wait::Limited).unwrap();
        self.socket.receive(&mut self.buffer).unwrap().unwrap().0
    }

    /// Opens a channel; returns its socket.
    fn open(&mut self, view: u64, files: &[OwnedFd]) -> Result<OwnedFd, Refusal> {
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let request = Request { id: 9, call: Call::OpenCopies { view } };
        self.socket.send(&request, &borrowed, Wait::Limited).unwrap();
        match self.socket.receive(&mut self.buffer).unwrap().unwrap() {
            (FromBroker::Answer { answer: Answer::CopiesOpened, .. }, mut files) => {
                Ok(files.pop().unwrap())
            }
            (FromBroker::Refused { refusal, .. }, _) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }
}

/// What a channel answers to a packet; `None` where it is closed.
fn send(channel: &OwnedFd, packet: &[u8]) -> Option<CopyAnswer> {
    rustix::net::sockopt::set_socket_timeout(
        channel,
        rustix::net::sockopt::Timeout::Recv,
        Some(SOON),
    )
    .unwrap();
    if rustix::net::send(channel, packet, rustix::net::SendFlags::NOSIGNAL).is_err() {
        return None;
    }
    let mut answer = [0; 64];
    let (_, count) =
        rustix::net::recv(channel, &mut answer, rustix::net::RecvFlags::empty()).ok()?;
    CopyAnswer::decode(&answer[..count])
}

fn read(channel: &OwnedFd, pieces: &[(u64, u32)]) -> Option<(Status, u32, u32)> {
    let pieces = pieces.iter().map(|(gpa, len)| Piece { gpa: *gpa, len: *len }).collect();
    let answer = send(channel, &CopyRequest { id: 77, write: false, at: 0, pieces }.encode())?;
    assert_eq!(answer.id, 77);
    Some((answer.status, answer.pieces, answer.bytes))
}

fn allocated(size: u64) -> OwnedFd {
    let file = memfd(size, SealFlags::SHRINK);
    fallocate(&file, FallocateFlags::empty(), 0, size).unwrap();
    file
}

#[test]
fn channels_that_make_no_sense_are_not_opened() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let _shared = broker.target("lion");
    let granted = broker.grant(&GrantRequest { uses: 2, ..request(Rights::ReadWrite) });
    let mut hand = Hand::attach(&broker, &granted.token);
    let other = Hand::attach(&broker, &granted.token);
    let view = hand.view;
    let good = || allocated(BUFFER as u64);
    let file = |file: std::fs::File| vec![OwnedFd::from(file)];
    let null = || std::fs::File::options().read(true).write(true).open("/dev/null").unwrap();
    let (_reader, writer) = std::io::pipe().unwrap();
    let unsealed = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    pwrite(&unsealed, &[0; BUFFER], 0).unwrap();
    let sealed = good();
    rustix::fs::fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    let cases: Vec<Vec<OwnedFd>> = vec![
        vec![],
        vec![good(), good()],
        file(null()),
        vec![writer.into()],
        vec![allocated(BUFFER as u64 - 0x1000)],
        // What the broker would have to pay for.
        vec![memfd(BUFFER as u64, SealFlags::SHRINK)],
        file(tempfile::tempfile().unwrap()),
        vec![unsealed],
        vec![sealed],
    ];
    for files in cases {
        assert_eq!(hand.open(view, &files).unwrap_err(), Refusal::Invalid, "{files:?}");
    }
    // Another connection's view, and none at all.
    for view in [other.view, 0, u64::MAX] {
        assert_eq!(hand.open(view, &[good()]).unwrap_err(), Refusal::Unknown);
    }
    // Each has a thread: a connection has few.
    let channels: Vec<OwnedFd> = (0..4).map(|_| hand.open(view, &[good()]).unwrap()).collect();
    assert_eq!(hand.open(view, &[good()]).unwrap_err(), Refusal::Limit);
    drop(channels);
    wait_for("the channels to end", || hand.open(view, &[good()]).is_ok());
}

#[test]
fn requests_that_make_no_sense_copy_nothing() {
    let broker = TestBroker::start_with(short_confirmation());
    let _private = Private::start(&broker, "tiger");
    let granted = broker.grant(&GrantRequest { uses: 2, ..request(Rights::ReadWrite) });
    let mut hand = Hand::attach(&broker, &granted.token);
    let view = hand.view;
    let file = allocated(BUFFER as u64);
    for packet in [&[][..], &[0; 15], &[0xff; 32], &[0; 1 << 16]] {
        let channel = hand.open(view, &[file.try_clone().unwrap()]).unwrap();
        assert_eq!(send(&channel, packet), None, "{} bytes", packet.len());
    }
    let first = Private::LOW_LEN - 0x1000;
    let mut channel = None;
    wait_for("the channels to end", || {
        channel = hand.open(view, &[file.try_clone().unwrap()]).ok();
        channel.is_some()
    });
    let channel = channel.unwrap();
    // A hole ends it, at the very byte; what comes before is there.
    assert_eq!(read(&channel, &[(first, 0x1000), (HIGH, 3)]), Some((Status::Done, 2, 0)));
    assert_eq!(read(&channel, &[(first, 0x1001), (HIGH, 3)]), Some((Status::Hole, 0, 0x1000)));
    assert_eq!(read(&channel, &[(HIGH, 3), (HIGH - 1, 3)]), Some((Status::Hole, 1, 0)));
    let mut bytes = [0; 3];
    pread(&file, &mut bytes, 0).unwrap();
    assert_eq!(bytes, [0, 1, 2].map(|at| pattern(Private::LOW_LEN + at)));
    // Its memory can be taken away while it is used.
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, hole, 0, BUFFER as u64).unwrap();
    assert_eq!(read(&channel, &[(0, 0x1000)]), Some((Status::Done, 1, 0)));

    // One that never confirms has no more copies all the same, by old channels or new ones.
    let revoked = broker.admin().revoke(granted.grant).unwrap();
    assert_eq!((revoked.views, revoked.unconfirmed), (1, 1));
    let pushed = hand.socket.receive::<FromBroker>(&mut hand.buffer).unwrap().unwrap().0;
    assert!(matches!(pushed, FromBroker::Revoke { .. }), "{pushed:?}");
    assert_eq!(read(&channel, &[(0, 8)]), Some((Status::Ended, 0, 0)));
    assert_eq!(hand.open(view, &[allocated(BUFFER as u64)]).unwrap_err(), Refusal::Unknown);
}

#[test]
fn channels_end_with_their_connection() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let (hand, channel, _) = Hand::attach_with_channel(&broker);
    assert_eq!(read(&channel, &[(0, 8)]), Some((Status::Done, 1, 0)));
    drop(hand);
    wait_for("the channel to end", || read(&channel, &[(0, 8)]).is_none());
    // And with the broker.
    let (_hand, channel, _) = Hand::attach_with_channel(&broker);
    broker.stop();
    wait_for("the channel to end", || read(&channel, &[(0, 8)]).is_none());
}

/// As a tool does that has no descriptors for a channel.
#[test]
fn a_view_that_is_undone_copies_no_more_and_leaves_its_use_to_another() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let (hand, channel, token) = Hand::attach_with_channel(&broker);
    let unusable = Unusable::View(hand.view);
    let call = Call::Unreceived { target: 1, introduction: 0, unusable };
    hand.socket.send(&Request { id: 0, call }, &[], Wait::Limited).unwrap();
    wait_for("the use to be returned", || broker.grants()[0].uses_left == 1);
    assert_eq!(read(&channel, &[(0, 8)]), Some((Status::Ended, 0, 0)));
    Hand::attach(&broker, &token);
}

#[test]
fn channels_leave_no_descriptor_behind() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let granted = broker.grant(&request(Rights::ReadWrite));
    let mut hand = Hand::attach(&broker, &granted.token);
    let view = hand.view;
    // Of this kind the other tests of this program have none.
    let left = || {
        let is_copy = |path: std::io::Result<std::path::PathBuf>| {
            path.is_ok_and(|path| path.to_string_lossy().contains("left-behind"))
        };
        let files = std::fs::read_dir("/proc/self/fd").unwrap();
        let files = files
            .filter(|entry| is_copy(std::fs::read_link(entry.as_ref().unwrap().path())))
            .count();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        (files, maps.matches("left-behind").count())
    };
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("left-behind", flags).unwrap();
    rustix::fs::ftruncate(&file, BUFFER as u64).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, BUFFER as u64).unwrap();
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    let files = [file];
    for _ in 0..20 {
        let mut channel = None;
        wait_for("a channel", || {
            channel = hand.open(view, &files).ok();
            channel.is_some()
        });
        assert_eq!(read(&channel.unwrap(), &[(0, 0x1000)]), Some((Status::Done, 1, 0)));
        assert!(hand.open(0, &files).is_err());
    }
    wait_for("the channels to be closed", || left() == (1, 0));
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A proxy answers copies with [`Status::Busy`] while its view is being changed.

use std::os::fd::AsFd;
use std::time::Duration;

use kvmmem::{Access, Token, View, ViewError};
use kvmmem_proto::copy::{CopyAnswer, CopyRequest, MAX_REQUEST, Status};
use kvmmem_proto::listener;
use kvmmem_proto::map::Region;
use kvmmem_proto::message::{Answer, Call, FromBroker, Request};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};
use kvmmem_proto::scope::{Rights, Scope};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, accept_with, recv, send,
    socketpair,
};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(60);

/// Serves one tool, whose second copy succeeds.
fn serve(listener: impl AsFd) {
    poll(&mut [PollFd::new(&listener, PollFlags::IN)], None).unwrap();
    let tool = accept_with(&listener, SocketFlags::CLOEXEC).unwrap();
    let tool = PacketSocket::accepted(tool, PATIENCE).unwrap();
    tool.limit_receive(Some(PATIENCE)).unwrap();
    let (mut buffer, mut channels) = (PacketBuffer::default(), Vec::new());
    while channels.len() < 2 {
        let (Request { id, call }, _) = tool.receive(&mut buffer).unwrap().unwrap();
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let (ours, theirs) = socketpair(family, kind, SocketFlags::CLOEXEC, None).unwrap();
        let answer = match call {
            Call::Attach { .. } => Answer::HostAttached {
                view: 1,
                grant: 1,
                target: 1,
                scope: Scope { rights: Rights::ReadWrite, spans: None },
                uuid: Uuid::nil(),
                name: String::new(),
                generation: 1,
                regions: vec![Region { gpa: 0, len: 0x1000, offset: 0, file: 0 }],
                copied: true,
            },
            _ => {
                channels.push(ours);
                Answer::CopiesOpened
            }
        };
        let files = [theirs.as_fd()];
        let files = if matches!(answer, Answer::CopiesOpened) { &files[..] } else { &[] };
        tool.send(&FromBroker::Answer { id, answer }, files, Wait::Limited).unwrap();
    }
    for status in [Status::Busy, Status::Busy, Status::Done] {
        let mut files: Vec<_> = channels.iter().map(|it| PollFd::new(it, PollFlags::IN)).collect();
        poll(&mut files, None).unwrap();
        let at = files.iter().position(|it| !it.revents().is_empty()).unwrap();
        let mut packet = vec![0; MAX_REQUEST];
        let (_, count) = recv(&channels[at], &mut packet[..], RecvFlags::empty()).unwrap();
        let id = CopyRequest::decode(&packet[..count]).unwrap().id;
        let pieces = u32::from(status == Status::Done);
        let answer = CopyAnswer { id, status, pieces, bytes: 0 };
        send(&channels[at], &answer.encode(), SendFlags::NOSIGNAL).unwrap();
    }
    // Until the tool closes.
    while tool.receive::<Request>(&mut buffer).unwrap().is_some() {}
}

#[test]
fn a_view_that_is_being_changed_is_no_hole_in_memory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("proxy.sock");
    let (listener, _lock) = listener::bind(&path, None).unwrap();
    std::thread::scope(|scope| {
        let proxy = scope.spawn(|| serve(&listener));
        let view = View::attach_host(&path, &Token::new([1; 4]), Access::Granted).unwrap();
        let failed = view.read_at(0, &mut [0; 8]).unwrap_err();
        let written = view.write_at(0, b"x").unwrap_err();
        for error in [failed, written] {
            assert_eq!(error.errno(), Some(11), "EAGAIN: {error}");
            assert!(matches!(error, ViewError::System { .. }) && !error.is_unreadable());
            assert!(error.to_string().contains("try again"), "{error}");
        }
        view.read_at(0, &mut [0; 8]).unwrap();
        drop(view);
        proxy.join().unwrap();
    });
}

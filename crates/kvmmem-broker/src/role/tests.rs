// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every call, sent on every kind of connection.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use kvmmem_kvmi::token::Token;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use uuid::Uuid;

use super::Role;
use crate::broker::Broker;
use crate::connection;
use crate::discover::attach::Which;
use crate::endpoint::Endpoint;
use crate::map::Region;
use crate::packet::{PacketBuffer, PacketSocket, Wait};
use crate::peer::{Credentials, Peer};
use crate::scope::Rights;
use crate::wire::{
    Answer, Call, Caller, Change, Cursor, FromBroker, GrantRequest, OnSilence, Refusal, Registration,
    Request, ViewCounters,
};

/// No user of the machine that tests run on.
const USER: u32 = 4_000_000_001;

const ROLES: [Role; 4] = [Role::Administrator, Role::Operator, Role::Viewer, Role::Vmm];

/// One of each call, with who may send it: administrator, operator, viewer, VMM. The arguments are such that a call that
/// may be sent is refused for another reason than the sender, if it is refused.
fn calls() -> Vec<(Call, &'static str)> {
    let token = || Token::new([1, 2, 3, 4]);
    let none = || "nowhere".to_owned();
    let counters = ViewCounters::default();
    let unix = Endpoint::Unix("/nowhere/at/all".into());
    let vsock = Endpoint::Vsock { cid: 99, port: 1 };
    let grant = GrantRequest {
        target: none(),
        spans: None,
        rights: Rights::ReadOnly,
        ttl_ms: 1,
        uses: 1,
        holder: None,
        label: None,
    };
    let caller = Caller { pid: 1, uid: 1, comm: none() };
    let nobody = Registration { name: String::new(), ..registration("nobody") };
    vec![
        (Call::Register(nobody), "ao--"),
        (Call::Redeem { token: token() }, "---v"),
        (Call::Used { token: token() }, "---v"),
        (Call::Attach { token: token(), caller, read_only: true }, "aohv"),
        (Call::Copy { view: 0, gpa: 0, len: 1, write: false }, "--h-"),
        (Call::Detached { view: 0, counters }, "--hv"),
        (Call::Counters { view: 0, counters }, "--hv"),
        (Call::RevokedDone { grant: 0 }, "--hv"),
        (Call::RamChanged { regions: vec![], change: Change::Reset }, "---v"),
        (Call::Grant(grant), "ao--"),
        (Call::Grants { after: Cursor::default() }, "ao--"),
        (Call::Revoke { grant: 0 }, "ao--"),
        (Call::Policy { target: none(), set: None }, "ao--"),
        (Call::Targets { after: 0 }, "ao--"),
        (Call::AddTarget { which: Which::Pid(0), name: None }, "a---"),
        (Call::RemoveTarget { target: none() }, "a---"),
        (
            Call::AddIntrospector {
                which: Which::Pid(0),
                cid: None,
                name: None,
                on_silence: OnSilence::Report,
            },
            "a---",
        ),
        (Call::RemoveIntrospector { name: none() }, "a---"),
        (Call::Room { introspector: none() }, "ao--"),
        (Call::Hook { target: none(), endpoint: unix.clone() }, "a---"),
        (Call::Hook { target: none(), endpoint: vsock.clone() }, "ao--"),
        (Call::Unhook { target: none(), endpoint: unix }, "ao--"),
        (Call::Unhook { target: none(), endpoint: vsock }, "ao--"),
    ]
}

/// A number for each kind of call. A call that is added does not compile without its line here, and without its line
/// above `every_call_is_tried` fails.
fn number(call: &Call) -> usize {
    match call {
        Call::Register(_) => 0,
        Call::Redeem { .. } => 1,
        Call::Used { .. } => 2,
        Call::Attach { .. } => 3,
        Call::Copy { .. } => 4,
        Call::Detached { .. } => 5,
        Call::Counters { .. } => 6,
        Call::RevokedDone { .. } => 7,
        Call::RamChanged { .. } => 8,
        Call::Grant(_) => 9,
        Call::Grants { .. } => 10,
        Call::Revoke { .. } => 11,
        Call::Policy { .. } => 12,
        Call::Targets { .. } => 13,
        Call::AddTarget { .. } => 14,
        Call::RemoveTarget { .. } => 15,
        Call::AddIntrospector { .. } => 16,
        Call::RemoveIntrospector { .. } => 17,
        Call::Room { .. } => 18,
        Call::Hook { .. } => 19,
        Call::Unhook { .. } => COUNT - 1,
    }
}

const COUNT: usize = 21;

/// A connection to a broker in this process, in the name of any user.
struct Connection {
    socket: Option<PacketSocket>,
    buffer: PacketBuffer,
    thread: Option<JoinHandle<()>>,
}

impl Connection {
    fn new(broker: &Arc<Broker>, uid: u32) -> Self {
        let flags = SocketFlags::CLOEXEC;
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let packets = |socket| PacketSocket::accepted(socket, Duration::from_secs(30)).unwrap();
        let (socket, peer) = (packets(pair.0), packets(pair.1));
        socket.limit_receive(Some(Duration::from_secs(30))).unwrap();
        let peer = Arc::new(Peer::new(peer, Credentials { pid: std::process::id(), uid }));
        let broker = Arc::clone(broker);
        let thread = std::thread::spawn(move || connection::serve(&broker, &peer));
        Self { socket: Some(socket), buffer: PacketBuffer::default(), thread: Some(thread) }
    }

    /// One that is what `role` says.
    fn of(broker: &Arc<Broker>, role: Role) -> Self {
        let mut connection = Self::new(broker, if role == Role::Administrator { 0 } else { USER });
        match role {
            Role::Administrator | Role::Operator => {}
            Role::Viewer => {
                let request = GrantRequest { target: "tiger".into(), ttl_ms: 60_000, ..grant_request() };
                let Ok(Answer::Granted { token, .. }) = connection.ask(Call::Grant(request), None) else {
                    panic!("no grant")
                };
                let caller = Caller { pid: 1, uid: 1, comm: "tool".into() };
                let attached = connection.ask(Call::Attach { token, caller, read_only: true }, None);
                assert!(matches!(attached, Ok(Answer::HostAttached { .. })), "{attached:?}");
            }
            Role::Vmm => {
                let lion = Registration { cid: Some(7), introspector: true, ..registration("lion") };
                connection.ask(Call::Register(lion), None).unwrap();
            }
        }
        connection
    }

    fn send(&self, call: Call, file: Option<OwnedFd>) {
        let files = file.as_ref().map(AsFd::as_fd);
        let socket = self.socket.as_ref().unwrap();
        socket.send(&Request { id: 1, call }, files.as_slice(), Wait::Limited).unwrap();
    }

    fn ask(&mut self, call: Call, file: Option<OwnedFd>) -> Result<Answer, (Refusal, String)> {
        self.send(call, file);
        loop {
            match self.socket.as_ref().unwrap().receive(&mut self.buffer).unwrap().expect("it was closed").0 {
                FromBroker::Answer { answer, .. } => return Ok(answer),
                FromBroker::Refused { refusal, message, .. } => return Err((refusal, message)),
                _ => {}
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        drop(self.socket.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn grant_request() -> GrantRequest {
    let (Call::Grant(request), _) = calls().swap_remove(9) else { panic!("not a grant") };
    request
}

fn registration(name: &str) -> Registration {
    Registration {
        name: name.into(),
        uuid: Uuid::from_u128(name.bytes().fold(1, |sum, byte| sum << 8 | u128::from(byte))),
        vcpus: 1,
        start_time_ms: 0,
        cid: None,
        introspectable: false,
        introspector: false,
        regions: vec![],
    }
}

fn ram() -> OwnedFd {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let file = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, 0x1000).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

#[test]
fn every_call_is_tried() {
    let mut numbers: Vec<usize> = calls().iter().map(|(call, _)| number(call)).collect();
    numbers.dedup();
    assert_eq!(numbers, (0..COUNT).collect::<Vec<_>>());
}

#[test]
fn every_call_is_denied_to_all_roles_but_its_own() {
    let broker = Arc::new(Broker::default());
    let mut tiger = Connection::new(&broker, USER);
    let regions = vec![Region { gpa: 0, len: 0x1000, offset: 0, file: 0 }];
    let registered = Registration { introspectable: true, regions, ..registration("tiger") };
    tiger.ask(Call::Register(registered), Some(ram())).unwrap();
    for (role, letter) in ROLES.into_iter().zip(['a', 'o', 'h', 'v']) {
        let mut connection = Connection::of(&broker, role);
        for (call, allowed) in calls() {
            let (words, allowed) = (format!("{role:?}: {call:?}"), allowed.contains(letter));
            assert_eq!(role.check(&call).is_ok(), allowed, "{words}");
            if call.is_one_way() {
                connection.send(call, None);
                continue;
            }
            match connection.ask(call, None) {
                Err((Refusal::Denied, message)) => {
                    assert!(!allowed, "{words}: {message}");
                    assert!(message.contains("may"), "{words}: {message}");
                }
                answer => assert!(allowed, "{words}: {answer:?}"),
            }
        }
        // None of it changed what the connection is.
        assert!(matches!(
            (role, connection.ask(Call::Targets { after: 0 }, None)),
            (Role::Administrator | Role::Operator, Ok(_))
                | (Role::Viewer | Role::Vmm, Err((Refusal::Denied, _)))
        ));
    }
}

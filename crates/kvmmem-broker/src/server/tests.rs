// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Users who take all that they can get: neither other users nor root are kept out.

mod last_owner;

use std::net::TcpStream;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::message::{
    Answer, Call, Caller, Cursor, FromBroker, KvmiPolicy, NewGrant, VmIdentity,
};
use uuid::Uuid;

use super::*;
use crate::core::quota::Bound;
use crate::test_peer::{Connection, USER, grant_request, identity};
use crate::test_wait::wait_for;

const OTHER: u32 = USER + 1;
const ROOT: u32 = 0;

/// Of eight, five are one user's and two are root's alone.
const FEW: Bound = Bound { total: 8, per_user: 5, reserve: 2 };

struct Running {
    server: Server,
    _directory: tempfile::TempDir,
}

impl Running {
    fn new(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let group = Some(rustix::process::getegid().as_raw());
        let server =
            Server::bind_with(&directory.path().join("broker.sock"), group, limits).unwrap();
        Self { server, _directory: directory }
    }

    fn connect(&self, uid: u32) -> Connection {
        let (connection, theirs) = Connection::pair();
        self.server.admit_as(theirs, by(uid)).unwrap();
        connection
    }

    fn target(&self, uid: u32, name: &str) -> Result<Connection, (Refusal, String)> {
        let mut connection = self.connect(uid);
        connection.register_target(name).map(|_| connection)
    }
}

/// How many are served, of as many as a user can think of; what is served is kept.
fn flood<T>(mut one: impl FnMut(usize) -> Result<T, (Refusal, String)>) -> (Vec<T>, String) {
    let mut taken = Vec::new();
    let mut last = String::new();
    for number in 0..100 {
        match one(number) {
            Ok(more) => taken.push(more),
            Err((Refusal::Limit, message)) => last = message,
            Err(other) => panic!("{other:?}"),
        }
    }
    (taken, last)
}

#[test]
fn a_user_with_all_its_connections_keeps_nobody_out() {
    let running = Running::new(Limits { connections: FEW, ..Limits::default() });
    let connect = |uid| {
        let mut connection = running.connect(uid);
        connection.ask(Call::Targets { after: 0 }, None).map(|_| connection)
    };
    let (mut taken, message) = flood(|_| connect(USER));
    assert!(taken.len() == 5 && message.contains("user 4000000001 has 5 already"), "{message}");
    let (others, message) = flood(|_| connect(OTHER));
    assert!(others.len() == 1 && message.contains("the last 2 are for root"), "{message}");
    // Root can still do what is to be done.
    let granted = {
        let _tiger = running.target(ROOT, "tiger").unwrap();
        let mut root = connect(ROOT).unwrap();
        let granted = root.ask(Call::Grant(grant_request("tiger")), None);
        let Ok(Answer::Granted(NewGrant { grant, .. })) = granted else { panic!("{granted:?}") };
        let revoked = root.ask(Call::Revoke { grant }, None);
        assert!(matches!(revoked, Ok(Answer::Revoked(_))), "{revoked:?}");
        assert_eq!(connect(ROOT).err().map(|(refusal, _)| refusal), Some(Refusal::Limit));
        grant
    };
    assert_eq!(granted, 1);
    // Who ends a connection may have another one.
    drop(taken.pop());
    wait_for("its share is free", || connect(USER).is_ok());
}

/// A connection that has sent a file whose close blocks until the returned peer is dropped, after a
/// packet that is no request.
fn lingering() -> (OwnedFd, TcpStream) {
    let (ours, theirs) = Connection::pair();
    (theirs, ours.break_off())
}

fn by(uid: u32) -> Credentials {
    Credentials { pid: std::process::id(), uid }
}

/// A connection that is refused may have sent a file already, and the broker closes that last.
#[test]
fn a_file_that_takes_long_to_close_keeps_nobody_out() {
    let running = Running::new(Limits { connections: FEW, ..Limits::default() });
    let taken: Vec<_> = (0..5).map(|_| running.connect(USER)).collect();
    let many: Vec<_> = (0..10).map(|_| lingering()).collect();
    let (done, is_done) = channel();
    std::thread::scope(|scope| {
        let mut peers = Vec::new();
        for (theirs, peer) in many {
            let (running, done) = (&running, done.clone());
            scope.spawn(move || done.send(running.server.admit_as(theirs, by(USER))).unwrap());
            peers.push(peer);
        }
        for _ in &peers {
            let refused = is_done.recv_timeout(Duration::from_secs(60));
            refused.expect("it was closed at once").unwrap();
        }
        let threads = std::fs::read_dir("/proc/self/task").unwrap();
        let closing = threads.filter(|task| {
            let name = std::fs::read_to_string(task.as_ref().unwrap().path().join("comm"));
            name.is_ok_and(|name| name.trim_end() == "close")
        });
        // Those of other tests count too, where they run in this process.
        assert!(closing.count() < 10);
    });
    drop(taken);
}

#[test]
fn a_connection_counts_until_its_files_are_closed() {
    let running = Running::new(Limits { connections: FEW, ..Limits::default() });
    let mut peers = Vec::new();
    for _ in 0..5 {
        let (theirs, peer) = lingering();
        running.server.admit_as(theirs, by(USER)).unwrap();
        peers.push(peer);
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    assert_eq!(running.server.shared.wait_for_peers(deadline), 0, "they have not ended");
    let connect = |uid| running.connect(uid).ask(Call::Targets { after: 0 }, None).map(drop);
    assert_eq!(connect(USER).map_err(|(refusal, _)| refusal), Err(Refusal::Limit));
    connect(OTHER).unwrap();
    connect(ROOT).unwrap();
    drop(peers);
    wait_for("its share is free", || connect(USER).is_ok());
}

#[test]
fn a_user_with_all_its_vms_keeps_nobody_out() {
    let running = Running::new(Limits { vms: FEW, ..Limits::default() });
    let (taken, message) = flood(|number| running.target(USER, &format!("vm-{number}")));
    assert!(
        taken.len() == 5 && message.contains("registered VMs: user 4000000001 has 5"),
        "{message}"
    );
    let (others, _) = flood(|number| running.target(OTHER, &format!("other-{number}")));
    assert_eq!(others.len(), 1);
    assert_eq!(flood(|number| running.target(ROOT, &format!("root-{number}"))).0.len(), 2);
    drop(taken);
    wait_for("its share is free", || running.target(USER, "again").is_ok());
}

#[test]
fn a_user_with_all_its_grants_keeps_nobody_out() {
    let running = Running::new(Limits { grants: FEW, ..Limits::default() });
    let _tiger = running.target(USER, "tiger").unwrap();
    let grant = |uid| {
        let mut connection = running.connect(uid);
        move |_| match connection.ask(Call::Grant(grant_request("tiger")), None)? {
            Answer::Granted(NewGrant { grant, .. }) => Ok(grant),
            other => panic!("{other:?}"),
        }
    };
    let (taken, message) = flood(grant(USER));
    assert!(taken.len() == 5 && message.contains("grants: user 4000000001 has 5"), "{message}");
    assert_eq!(flood(grant(OTHER)).0.len(), 1);
    assert_eq!(grant(ROOT)(0), Ok(7));
    running.connect(ROOT).ask(Call::Revoke { grant: taken[0] }, None).unwrap();
    assert_eq!(flood(grant(USER)).0.len(), 0, "root has taken one of the common connections");
    running.connect(ROOT).ask(Call::Revoke { grant: 7 }, None).unwrap();
    assert_eq!(flood(grant(USER)).0.len(), 1);
}

#[test]
fn a_user_with_all_its_hooks_keeps_nobody_out() {
    let running = Running::new(Limits { hooks: FEW, ..Limits::default() });
    let _targets: Vec<_> =
        (0..3).map(|number| running.target(USER, &format!("vm-{number}")).unwrap()).collect();
    let mut lion = running.connect(USER);
    let looking = VmIdentity { cid: Some(7), introspector: true, ..identity("lion") };
    lion.ask(Call::Register(looking.registered(vec![])), None).unwrap();
    let mut port = 0;
    let mut hook = |uid| {
        let mut connection = running.connect(uid);
        flood(|number| {
            port += 1;
            let call = Call::Hook {
                target: format!("vm-{}", number % 3),
                endpoint: Endpoint::Vsock { cid: 7, port },
            };
            connection.ask(call, None)
        })
    };
    let (taken, message) = hook(USER);
    assert!(taken.len() == 5 && message.contains("hooks: user 4000000001 has 5"), "{message}");
    assert_eq!(hook(OTHER).0.len(), 1);
    assert_eq!(hook(ROOT).0.len(), 2);
    // They end with the tool's VM, and with them their connections.
    drop(lion);
    wait_for("its hooks end", || running.server.service().broker().hook_count() == 0);
}

#[test]
fn a_user_with_all_its_policies_keeps_nobody_out() {
    let running = Running::new(Limits { policies: FEW, ..Limits::default() });
    let set = |uid, first: usize| {
        let mut connection = running.connect(uid);
        flood(|number| {
            let target = Uuid::from_u128((first + number) as u128).to_string();
            connection.ask(Call::Policy { target, set: Some(KvmiPolicy::None) }, None)
        })
    };
    let (taken, message) = set(USER, 1);
    assert!(taken.len() == 5 && message.contains("user 4000000001 has 5"), "{message}");
    assert!(message.contains("rw"), "what makes room is not named: {message}");
    assert_eq!(set(OTHER, 1000).0.len(), 1);
    assert_eq!(set(ROOT, 2000).0.len(), 2);
    // The default makes room.
    let mut root = running.connect(ROOT);
    for number in 1..6 {
        let target = Uuid::from_u128(number).to_string();
        root.ask(Call::Policy { target, set: Some(KvmiPolicy::ReadWrite) }, None).unwrap();
    }
    assert_eq!(set(USER, 3000).0.len(), 3);
}

#[test]
fn a_peer_that_reads_nothing_holds_few_descriptors() {
    let running = Running::new(Limits::default());
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("audit.log");
    running.server.service().broker().write_audit_to(&log).unwrap();
    let _tiger = running.target(USER, "tiger").unwrap();
    let mut viewer = running.connect(USER);
    let request = kvmmem_proto::message::GrantRequest { uses: 64, ..grant_request("tiger") };
    let Ok(Answer::Granted(NewGrant { token, .. })) = viewer.ask(Call::Grant(request), None) else {
        panic!("no grant")
    };
    for _ in 0..64 {
        let caller = Caller { pid: 1, uid: 1, comm: "tool".into() };
        viewer.send(
            Call::Attach { token: token.clone(), caller, read_only: false, reaching: vec![] },
            None,
        );
    }
    // It is cut off, and only the descriptors of the first answer have been sent to it.
    let mut root = running.connect(ROOT);
    let mut open = || match root.ask(Call::Grants { after: Cursor::default() }, None) {
        Ok(Answer::Grants { grants, .. }) => {
            grants.iter().map(|grant| grant.views.len()).sum::<usize>()
        }
        other => panic!("{other:?}"),
    };
    let mut most = 0;
    wait_for("it is cut off", || {
        let is_attached = std::fs::read_to_string(&log).unwrap().contains("\"attached\"");
        let now = open();
        most = most.max(now);
        is_attached && now == 0
    });
    assert!(most <= 2, "{most} views were open at once");
    let mut files = 0;
    while let Some((message, with)) = viewer.next() {
        files += with.len();
        let is_view =
            matches!(message, FromBroker::Answer { answer: Answer::HostAttached { .. }, .. });
        assert!(is_view, "{message:?}");
    }
    assert_eq!(files, 1);
}

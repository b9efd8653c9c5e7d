// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Steps of hooks that panic, and tools that keep them.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use kvmmem_kvmi::handshake::{ToolHello, VmHello};
use kvmmem_kvmi::message::{HEADER_SIZE, MAX_PAYLOAD};
use kvmmem_kvmi::request::Request;
use kvmmem_proto::message::{Answer, Call};
use kvmmem_proto::packet::{PacketSocket, Wait};

use super::*;
use crate::reactor::tests::{hold, is_alive};
use crate::service::Service;
use crate::test_peer;
use crate::test_wait::wait_for;

/// How long anything may take on a slow machine.
const LIMIT: Duration = Duration::from_secs(60);

/// The hooks whose next step fails.
static FAILING: Mutex<Vec<Endpoint>> = Mutex::new(Vec::new());

pub(super) fn fail_if_asked(endpoint: &Endpoint) {
    let mut failing = lock(&FAILING);
    if let Some(index) = failing.iter().position(|other| other == endpoint) {
        failing.swap_remove(index);
        drop(failing);
        panic!("on purpose");
    }
}

fn accept(listener: &UnixListener) -> UnixStream {
    let deadline = Instant::now() + LIMIT;
    let mut stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                assert!(Instant::now() < deadline, "the hook does not connect");
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    };
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    VmHello::receive(&mut stream).unwrap();
    ToolHello::default().send(&mut stream).unwrap();
    stream
}

#[test]
fn a_hook_that_cannot_be_started_is_ended_in_the_audit_log() {
    let service = Arc::new(Service::default());
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("audit.log");
    service.broker().write_audit_to(&log).unwrap();
    let mut target = test_peer::Connection::new(&service, 0);
    target.register_target("tiger").unwrap();
    let mut admin = test_peer::Connection::new(&service, 0);
    service.reactor().end();
    let endpoint = Endpoint::Unix(directory.path().join("tool.sock"));
    let refused = admin.ask(Call::Hook { target: "tiger".into(), endpoint }, None).unwrap_err();
    assert!(refused.1.contains("cannot start the hook"), "{refused:?}");
    let log = std::fs::read_to_string(log).unwrap();
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let hooks = lines.iter().filter(|line| line["event"] == "hook");
    let hooks: Vec<_> = hooks.map(|line| (&line["on"], line["reason"].as_str())).collect();
    let ended = (&false.into(), Some("it could not be started"));
    assert_eq!(hooks, [(&true.into(), None), ended]);
}

#[test]
fn a_hook_connects_again_where_a_step_has_failed() {
    let service = Arc::new(Service::default());
    let mut target = test_peer::Connection::new(&service, 0);
    target.register_target("tiger").unwrap();
    let mut admin = test_peer::Connection::new(&service, 0);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tool.sock");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let endpoint = Endpoint::Unix(path);
    let fail = || lock(&FAILING).push(endpoint.clone());

    fail();
    let call = Call::Hook { target: "tiger".into(), endpoint: endpoint.clone() };
    assert!(matches!(admin.ask(call, None), Ok(Answer::Done)));
    let mut tool = accept(&listener);

    fail();
    let mut request = Vec::new();
    Request::GetVersion.encode(1, &mut request).unwrap();
    let deadline = Instant::now() + LIMIT;
    // A step lasts as long as the tool sends one request after the other.
    while tool.write_all(&request).is_ok() && tool.read(&mut [0; 64]).is_ok_and(|size| size > 0) {
        assert!(Instant::now() < deadline, "the step does not fail");
        std::thread::sleep(2 * LINGER);
    }
    drop(accept(&listener));

    let call = Call::Unhook { target: "tiger".into(), endpoint: endpoint.clone() };
    assert!(matches!(admin.ask(call, None), Ok(Answer::Done)));
    let left = service.broker().wait_for_hooks(Instant::now() + LIMIT);
    assert_eq!(left, 0);
}

/// What a tool has sent and the broker has not received is closed with the stream.
#[test]
fn a_tool_s_file_that_takes_long_to_close_holds_up_nothing_but_its_hook() {
    let service = Arc::new(Service::default());
    let mut target = test_peer::Connection::new(&service, 0);
    target.register_target("tiger").unwrap();
    let mut admin = test_peer::Connection::new(&service, 0);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tool.sock");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let endpoint = Endpoint::Unix(path);
    let call = Call::Hook { target: "tiger".into(), endpoint };
    assert!(matches!(admin.ask(call, None), Ok(Answer::Done)));
    let mut tool = accept(&listener);
    let hook = Arc::clone(&lock(&service.broker().find("tiger").unwrap().hooks().list).hooks[0]);
    wait_for("the hook to wait", || hook.lock().connected && !hook.lock().is_busy);
    let stream = hook.lock().stream.as_ref().map(Arc::downgrade).unwrap();

    // The reactor waits until all has been sent.
    let free = hold(service.reactor());
    // As much as is read at once, too long a message.
    tool.write_all(&[0xff; HEADER_SIZE + MAX_PAYLOAD]).unwrap();
    let (file, other_end) = test_peer::lingering();
    let tool = PacketSocket::accepted(tool.into(), LIMIT).unwrap();
    tool.send(&"a file", &[file.as_fd()], Wait::Limited).unwrap();
    drop(file);
    drop(free);

    wait_for("the stream to be closed", || stream.strong_count() == 0);
    assert!(matches!(admin.ask(Call::Targets { after: 0 }, None), Ok(Answer::Targets { .. })));
    assert!(is_alive(service.reactor()));
    assert!(hook.lock().is_busy, "it connects to that tool again");
    drop(other_end);
    wait_for("the hook to connect again", || listener.accept().is_ok());
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker needs no thread for. Threads are counted by their names, so all tests of this
//! program run one after the other.

mod common;
#[allow(dead_code, reason = "the tests of program discover use the rest")]
#[path = "discover/fake.rs"]
mod fake;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::{TestBroker, Tool, ToolSession, request, wait_for};
use fake::{Fake, HONEST};
use kvmmem::{Access, View};
use kvmmem_client::admin::{GrantRequest, Rights, Which};
use kvmmem_client::vmm::VmmLink;
use kvmmem_kvmi::request::Request;
use kvmmem_proto::endpoint::Endpoint;
use serde_json::{Value, json};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Waits until no other broker has threads, and has them to itself.
fn alone() -> MutexGuard<'static, ()> {
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    wait_for("all threads to end", || ["session", "reactor", "peer"].map(threads) == [0; 3]);
    guard
}

/// How many threads of this process have a name.
fn threads(name: &str) -> usize {
    names().filter(|comm| comm == name).count()
}

/// How many it has in all, without those of [`serve_qmp`].
fn all_threads() -> usize {
    names().filter(|comm| comm != FAKE).count()
}

fn names() -> impl Iterator<Item = String> {
    let names = std::fs::read_dir("/proc/self/task").unwrap();
    names
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .map(|comm| comm.trim_end().to_owned())
}

/// Name of the threads of [`serve_qmp`].
const FAKE: &str = "fake-qmp";

/// Answers as the QEMU of a fake VMM until the test is over.
fn serve_qmp(path: &Path, hva: u64) {
    let listener = UnixListener::bind(path).unwrap();
    let serve = move |stream: &UnixStream| -> Option<()> {
        let mut writer = stream;
        let mut send = |value: Value| writer.write_all(format!("{value}\n").as_bytes()).ok();
        send(json!({ "QMP": {} }))?;
        for line in BufReader::new(stream).lines() {
            let line = line.ok()?;
            let request: Value = serde_json::from_str(&line).unwrap();
            let command = request["execute"].as_str().unwrap();
            let answer = fake::qmp_answer(&line, command, hva);
            send(json!({ "return": answer, "id": request["id"] }))?;
        }
        Some(())
    };
    let serve =
        move || listener.incoming().for_each(|stream| serve(&stream.unwrap()).unwrap_or_default());
    std::thread::Builder::new().name(FAKE.into()).spawn(serve).unwrap();
}

#[test]
fn targets_with_qmp_have_no_thread() {
    const TARGETS: usize = 50;
    // The reactor, pools, and the other tests, which wait for this one.
    const OTHERS: usize = 20;
    let _alone = alone();
    let before = all_threads();
    let broker = TestBroker::start();
    let mut admin = broker.admin();
    let mut fakes = Vec::new();
    for n in 0..TARGETS {
        let fake = Fake::start("sealed", HONEST);
        let path = broker.directory.path().join(format!("{n}.qmp"));
        serve_qmp(&path, fake.hva());
        let which = Which::Qmp { socket: path, pid: Some(fake.pid()) };
        admin.add_target(&which, Some(&format!("vm-{n}"))).unwrap();
        fakes.push(fake);
    }
    let pools = ["reactor", "vmm-watch", "service", "session"];
    let is_idle =
        || pools.map(threads).iter().sum::<usize>() <= 4 && all_threads() <= before + OTHERS;
    wait_for("idle threads to end", is_idle);
    assert_eq!(admin.targets().unwrap().len(), TARGETS);
    // Those of processes that end are noticed, all of them.
    fakes.iter_mut().for_each(Fake::end);
    wait_for("the targets to go", || admin.targets().unwrap().is_empty());
    wait_for("idle threads to end", is_idle);
}

#[test]
fn connections_that_are_idle_have_no_thread() {
    const TARGETS: usize = 50;
    let _alone = alone();
    let broker = TestBroker::start();
    let mut targets: Vec<_> =
        (0..TARGETS).map(|n| (n, broker.target(&format!("vm-{n}")))).collect();
    let (viewer, views) = broker.viewer("lion", 7, Duration::ZERO);
    let idle = || wait_for("idle connections to have no thread", || threads("peer") == 0);
    idle();
    let grant = |n: usize| {
        let request = request(Rights::ReadOnly);
        broker.grant(&GrantRequest { target: format!("vm-{n}"), uses: 2, ..request })
    };
    // What an idle VMM and an idle process ask and confirm arrives.
    for n in [0, 1] {
        let granted = grant(n);
        views.open(&viewer, &granted.token).unwrap();
        let _view = View::attach_host(&broker.path, &granted.token, Access::Granted).unwrap();
        idle();
        let revoked = broker.admin().revoke(granted.grant).unwrap();
        assert_eq!((revoked.views, revoked.unconfirmed), (2, 0));
    }
    // So do their ends.
    let granted = grant(TARGETS - 1);
    views.open(&viewer, &granted.token).unwrap();
    idle();
    targets.retain(|(n, _)| n % 2 == 0);
    wait_for("half of the targets to go", || {
        broker.admin().targets().unwrap().len() == TARGETS / 2 + 1
    });
    wait_for("the view to go", || views.count() == 0);
    idle();
    drop(broker);
    wait_for("all threads to end", || threads("peer") + threads("reactor") == 0);
    // Their sockets are closed as well.
    wait_for("the VMMs to hear of it", || views.log().contains(&"lost".to_owned()));
}

/// Targets with a tool hooked to each, which is connected.
fn hooked(broker: &TestBroker, count: usize) -> (Vec<VmmLink>, Vec<Tool>, Vec<ToolSession>) {
    let mut admin = broker.admin();
    let (mut links, mut tools, mut sessions) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..count {
        links.push(broker.target(&format!("vm-{n}")));
        let tool = Tool::listen(broker, &format!("tool-{n}.sock"));
        admin.hook(&format!("vm-{n}"), &tool.endpoint).unwrap();
        sessions.push(tool.accept());
        tools.push(tool);
    }
    (links, tools, sessions)
}

#[test]
fn hooks_that_wait_have_no_thread() {
    let _alone = alone();
    let broker = TestBroker::start();
    let (_links, tools, mut sessions) = hooked(&broker, 30);
    let mut admin = broker.admin();
    for n in 0..120 {
        let endpoint = Endpoint::Unix(broker.directory.path().join(format!("none-{n}.sock")));
        admin.hook(&format!("vm-{}", n % 30), &endpoint).unwrap();
    }
    assert_eq!(broker.state.hook_count(), 150);
    // Those that were needed meanwhile end. At most four at a time look for tools.
    wait_for("idle threads to end", || threads("session") <= 6);
    // That of the broker before may still be ending.
    wait_for("one reactor", || threads("reactor") == 1);
    for session in &mut sessions {
        assert!(session.ask(Request::GetVersion).is_ok());
    }
    // A tool that begins to listen is found, and one that comes back is found again.
    let late = Tool::listen(&broker, "none-7.sock");
    assert!(late.accept().ask(Request::GetVersion).is_ok());
    drop(sessions);
    assert!(tools.iter().all(|tool| tool.accept().ask(Request::GetVersion).is_ok()));
    drop(broker);
    wait_for("all threads to end", || threads("session") + threads("reactor") == 0);
}

/// With a thread for each of these that it holds, the last ones would be served only when the first
/// ones have been cut off.
#[test]
fn a_tool_that_sends_half_a_message_holds_no_thread() {
    let _alone = alone();
    let broker = TestBroker::start();
    let (_links, _tools, mut sessions) = hooked(&broker, 100);
    let mut request = Vec::new();
    Request::ReadPhysical { gpa: 0, size: 8 }.encode(1, &mut request).unwrap();
    let (half, rest) = request.split_at(11);
    sessions.iter_mut().for_each(|session| session.stream.write_all(half).unwrap());
    for session in sessions.iter_mut().rev() {
        session.stream.write_all(rest).unwrap();
        let mut reply = [0; 24];
        std::io::Read::read_exact(&mut session.stream, &mut reply).unwrap();
    }
}

#[test]
fn a_tool_that_asks_without_end_holds_up_no_other() {
    let _alone = alone();
    let broker = TestBroker::start();
    // More than there are workers.
    let (_links, _tools, mut sessions) = hooked(&broker, 60);
    let mut quiet = sessions.pop().unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut readers = Vec::new();
        for session in &sessions {
            let (mut writer, mut reader) =
                (session.stream.try_clone().unwrap(), session.stream.try_clone().unwrap());
            let stop = &stop;
            scope.spawn(move || {
                let mut request = Vec::new();
                Request::ReadPhysical { gpa: 0, size: 4096 }.encode(1, &mut request).unwrap();
                let requests = request.repeat(100);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    if writer.write_all(&requests).is_err() {
                        return;
                    }
                }
            });
            readers.push(scope.spawn(move || {
                while std::io::Read::read(&mut reader, &mut [0; 1 << 16]).is_ok_and(|n| n > 0) {}
            }));
        }
        for _ in 0..20 {
            assert!(quiet.ask(Request::GetVersion).is_ok());
        }
        assert!(threads("session") <= 48);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        sessions.iter().for_each(|session| {
            session.stream.shutdown(std::net::Shutdown::Both).unwrap();
        });
    });
}

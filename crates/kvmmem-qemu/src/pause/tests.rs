// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The end of pauses, with a fake QEMU, and the shell that outlives the broker.

use std::os::unix::net::UnixStream;

use super::*;
use crate::fake_qemu::{Fake, Fault, PATIENCE};

/// A fake QEMU that runs, a connection to it, and who may pause it.
fn fake() -> (Fake, Qmp, Holders) {
    let fake = Fake::start("running");
    let qmp = Qmp::connect(&fake.path).unwrap();
    (fake, qmp, Holders::new(PATIENCE))
}

#[test]
fn a_vm_runs_at_the_end_though_the_connection_was_lost() {
    let (fake, mut qmp, mut holders) = fake();
    assert!(holders.hold(&mut qmp, 1, true).unwrap());
    drop(qmp);
    holders.lost();
    let mut qmp = Qmp::connect(&fake.path).unwrap();
    assert!(!holders.close(Some(&mut qmp)));
    assert_eq!(fake.machine().commands, ["stop", "cont"]);
    // It cannot be stopped again: nothing would let it run.
    assert!(matches!(holders.hold(&mut qmp, 2, true), Err(AskError::NoConnection)));
    assert_eq!(fake.machine().status, "running");
}

#[test]
fn a_vm_that_cannot_be_resumed_at_the_end_is_reported() {
    let (fake, mut qmp, mut holders) = fake();
    assert!(holders.hold(&mut qmp, 1, true).unwrap());
    fake.machine().fault = Some(("cont", Fault::Close));
    assert!(holders.close(Some(&mut qmp)));
    assert!(holders.close(None));
    assert!(!Holders::new(PATIENCE).close(None));
}

#[test]
fn a_holder_that_cannot_be_added_leaves_no_vm_stopped() {
    for is_tried_again in [false, true] {
        let (fake, mut qmp, mut holders) = fake();
        fake.machine().fault = Some(("stop", Fault::CloseAfter));
        assert!(holders.hold(&mut qmp, 1, true).is_err());
        drop(qmp);
        assert_eq!(fake.machine().status, "paused");
        // As if it were the same connection, on which nothing is lost.
        let mut qmp = Qmp::connect(&fake.path).unwrap();
        if is_tried_again {
            assert!(holders.hold(&mut qmp, 2, true).unwrap(), "it ran before");
            holders.release(&mut qmp, 2).unwrap();
        }
        let released = holders.release(&mut qmp, 1);
        assert!(matches!(released, Err(AskError::Resumed)), "{released:?}");
        assert_eq!(fake.machine().status, "running");
    }
}

#[test]
fn the_shell_keeps_the_connection_until_cont_is_answered() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut watcher = Watcher::start(theirs.as_fd(), Duration::from_secs(3600)).unwrap();
    drop(theirs);
    watcher.beat();
    // The shell has read it, and waits for more.
    while rustix::io::ioctl_fionread(watcher.0.stdin.as_ref().unwrap()).unwrap() > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(watcher.ended().is_none());
    drop(watcher.0.stdin.take());
    let mut line = [0; 64];
    let count = ours.read(&mut line).unwrap();
    let command: serde_json::Value = serde_json::from_slice(&line[..count]).unwrap();
    assert_eq!(command, json!({ "execute": "cont", "id": "resume" }));
    for answer in
        ["{\"return\": {}}", "{\"event\": \"RESUME\"}", "{\"return\": {}, \"id\": \"resume\"}"]
    {
        assert!(watcher.ended().is_none(), "{answer}");
        ours.write_all(format!("{answer}\r\n").as_bytes()).unwrap();
    }
    // A connection that is closed with something unread in it is reset.
    assert_eq!(ours.read(&mut line).unwrap(), 0);
    assert!(watcher.0.wait().unwrap().success());
}

#[test]
fn a_shell_that_is_killed_is_noticed() {
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let mut watcher = Watcher::start(theirs.as_fd(), Duration::from_secs(3600)).unwrap();
    watcher.0.kill().unwrap();
    watcher.0.wait().unwrap();
    assert!(watcher.ended().is_some_and(|status| !status.success()));
    watcher.beat();
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Live update and migration of targets under a stock QEMU. Those of version 10 and later can be
//! updated as they run.

mod common;

use std::path::Path;
use std::time::Duration;

use kvmmem_client::admin::{GrantRequest, Rights};

use common::qemu::{Qemu, add_confirmed, has_qemu};
use common::{PATIENCE, TestBroker, request, wait_for};
use kvmmem::host::{HostEvent, HostLink, HostView};
use serde_json::{Value, json};

/// A machine whose RAM another QEMU can take over.
const MACHINE: &[&str] = &[
    "-m",
    "64",
    "-object",
    "memory-backend-memfd,id=ram0,size=64M,share=on",
    "-machine",
    "q35,memory-backend=ram0,aux-ram-share=on",
];

fn socket(path: &Path) -> Value {
    json!({ "transport": "socket", "type": "unix", "path": path })
}

/// Starts the QEMU that `old` shall migrate to, by live update where `is_update`, and migrates.
fn migrate(broker: &TestBroker, old: &Qemu, is_update: bool) -> Qemu {
    let [main, cpr] = ["main.sock", "cpr.sock"].map(|name| broker.directory.path().join(name));
    let incoming = format!("unix:{}", main.display());
    let channel = |kind: &str, path| json!({ "channel-type": kind, "addr": socket(path) });
    let second = channel("cpr", &cpr).to_string();
    let mut arguments = [MACHINE, &["-incoming", &incoming]].concat();
    if is_update {
        arguments.extend(["-incoming", &second]);
    }
    let new = start_incoming(broker, &arguments, if is_update { &cpr } else { &main });
    let mut monitor = old.monitor();
    if is_update {
        monitor.execute("migrate-set-parameters", json!({ "mode": "cpr-transfer" }));
    }
    let channels = [("main", &main), ("cpr", &cpr)];
    let channels = channels.iter().take(1 + usize::from(is_update));
    let channels: Vec<Value> = channels.map(|(kind, path)| channel(kind, path)).collect();
    monitor.execute("migrate", json!({ "channels": channels }));
    monitor.wait_status("postmigrate");
    new.monitor().wait_status("running");
    new
}

/// A QEMU that waits for a VM to come has monitors only then.
fn start_incoming(broker: &TestBroker, arguments: &[&str], listens: &Path) -> Qemu {
    let new = Qemu::spawn(broker, "new", arguments).unwrap();
    common::qemu::wait_long("the new QEMU to listen", || common::qemu::listens(listens));
    new
}

/// A QEMU whose firmware has run, and whose monitor the broker listens to.
fn start_listened(broker: &TestBroker) -> Qemu {
    let old = Qemu::start(broker, "old", MACHINE).unwrap();
    add_confirmed(broker, &old);
    broker.admin().remove_target("old").unwrap();
    broker.admin().add_target(&old.socket(), None).unwrap();
    old
}

fn attach(broker: &TestBroker) -> (HostLink, HostView) {
    let terms = GrantRequest { target: "old".into(), ..request(Rights::ReadOnly) };
    HostLink::attach(&broker.path, &broker.grant(&terms).token, true).unwrap()
}

/// Whether a view shows what the firmware has left.
fn shows_the_guest(view: &HostView) -> bool {
    let region = view.regions.iter().find(|region| region.gpa == 0xc_0000).unwrap();
    let mut bios = vec![0; 0x2_0000];
    rustix::io::pread(&view.files[0], &mut bios, region.offset + 0x2_0000).unwrap();
    bios.chunks(16).any(|chunk| chunk.starts_with(b"RSD PTR "))
}

#[test]
fn views_and_grants_survive_a_live_update() {
    if !has_qemu(10) {
        return;
    }
    let broker = TestBroker::start();
    let old = Qemu::start(&broker, "old", MACHINE).unwrap();
    add_confirmed(&broker, &old);
    let (mut link, view) = attach(&broker);
    let unused = broker.grant(&GrantRequest { target: "old".into(), ..request(Rights::ReadOnly) });
    let new = migrate(&broker, &old, true);
    old.monitor().quit();
    let pid = || broker.admin().targets().unwrap().first().map(|target| target.pid);
    wait_for("the new QEMU to be the target's", || pid() == Some(new.process.id()));
    assert_eq!(link.wait(Duration::from_millis(100)).unwrap(), None);
    assert!(shows_the_guest(&view));
    let (_link, later) = HostLink::attach(&broker.path, &unused.token, true).unwrap();
    assert!(shows_the_guest(&later));
    drop((old, new));
    assert_eq!(link.wait(PATIENCE).unwrap(), Some(HostEvent::Gone));
    wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
}

#[test]
fn a_monitor_tells_of_a_live_update_before_the_old_qemu_ends() {
    if !has_qemu(10) {
        return;
    }
    let broker = TestBroker::start();
    let old = start_listened(&broker);
    let (mut link, view) = attach(&broker);
    let new = migrate(&broker, &old, true);
    let pid = || broker.admin().targets().unwrap().first().map(|target| target.pid);
    wait_for("the new QEMU to be the target's", || pid() == Some(new.process.id()));
    drop(old);
    assert_eq!(link.wait(Duration::from_millis(100)).unwrap(), None);
    assert!(shows_the_guest(&view));
    // The new QEMU is listened to.
    reset(&new, &mut link);
    drop(new);
    assert_eq!(link.wait(PATIENCE).unwrap(), Some(HostEvent::Gone));
}

#[test]
fn a_qemu_that_updates_itself_in_place_stays_the_target() {
    if !has_qemu(10) {
        return;
    }
    let broker = TestBroker::start();
    let old = start_listened(&broker);
    let (mut link, view) = attach(&broker);
    let state = format!("file:{}", broker.directory.path().join("state").display());
    let mut command = vec!["qemu-system-x86_64".to_owned()];
    command.extend(old.arguments(&[MACHINE, &["-incoming", &state]].concat()));
    let mut monitor = old.monitor();
    let mode = json!({ "mode": "cpr-exec", "cpr-exec-command": command });
    monitor.execute("migrate-set-parameters", mode);
    monitor.execute("migrate", json!({ "uri": state }));
    monitor.wait_end();
    old.monitor().wait_status("running");
    assert_eq!(link.wait(Duration::from_millis(100)).unwrap(), None);
    assert!(shows_the_guest(&view));
    let pid = broker.admin().targets().unwrap().first().map(|target| target.pid);
    assert_eq!(pid, Some(old.process.id()));
    reset(&old, &mut link);
}

/// Resets a VM until a view is told: its monitor may not be connected again at once.
fn reset(qemu: &Qemu, link: &mut HostLink) {
    let mut monitor = qemu.monitor();
    for _ in 0..240 {
        monitor.execute("system_reset", json!({}));
        match link.wait(Duration::from_millis(500)).unwrap() {
            None => {}
            Some(HostEvent::Changed { .. }) => return,
            other => panic!("{other:?}"),
        }
    }
    panic!("no reset is told");
}

#[test]
fn a_monitor_tells_that_the_vm_has_moved() {
    if !has_qemu(10) {
        return;
    }
    let broker = TestBroker::start();
    let old = Qemu::start(&broker, "old", MACHINE).unwrap();
    broker.admin().add_target(&old.socket(), None).unwrap();
    let (mut link, _view) = attach(&broker);
    let _new = migrate(&broker, &old, false);
    assert_eq!(link.wait(PATIENCE).unwrap(), Some(HostEvent::Gone));
    wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
}

#[test]
fn views_end_where_the_vm_moves_to_other_memory() {
    if !has_qemu(10) {
        return;
    }
    let broker = TestBroker::start();
    let old = Qemu::start(&broker, "old", MACHINE).unwrap();
    add_confirmed(&broker, &old);
    let (mut link, _view) = attach(&broker);
    let new = migrate(&broker, &old, false);
    old.monitor().quit();
    assert_eq!(link.wait(PATIENCE).unwrap(), Some(HostEvent::Gone));
    wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    // It is another target now.
    assert_eq!(add_confirmed(&broker, &new).target.identity.name, "new");
}

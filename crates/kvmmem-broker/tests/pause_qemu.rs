// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registers and pauses of VMs under the stock QEMU of this machine.

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use kvmmem_client::ClientError;
use kvmmem_client::admin::{Admin, Which};
use kvmmem_qemu::qmp::Qmp;

use common::qemu::{FIRMWARE, Qemu, wait_long};
use common::{TestBroker, wait_for};
use kvmmem_broker::Limits;
use serde_json::json;

/// Two vCPUs under QEMU, added by its monitor.
fn start(broker: &TestBroker, name: &str) -> Option<Qemu> {
    let backend = "memory-backend-memfd,id=ram0,size=64M,share=on";
    let machine =
        ["-m", "64M", "-smp", "2", "-object", backend, "-machine", "q35,memory-backend=ram0"];
    let qemu = Qemu::start(broker, name, &machine)?;
    broker.admin().add_target(&qemu.socket(), None).unwrap();
    Some(qemu)
}

#[test]
fn registers_are_those_of_the_vcpus() {
    let broker = TestBroker::start();
    let Some(qemu) = start(&broker, "seen") else { return };
    let mut monitor = qemu.monitor();
    monitor.execute("stop", json!({}));
    let registers = broker.admin().registers("seen").unwrap();
    assert_eq!(registers.len(), 2);
    for (number, vcpu) in registers.iter().enumerate() {
        let arguments = json!({ "command-line": "info registers", "cpu-index": number });
        let text = monitor.execute("human-monitor-command", arguments);
        let text = text.as_str().unwrap();
        // The firmware may run in any mode but the long one.
        for (name, value) in
            [("CR0", vcpu.cr0), ("EIP", vcpu.rip), ("EFL", vcpu.rflags), ("ESP", vcpu.general[7])]
        {
            assert!(text.contains(&format!("{name}={value:08x}")), "{name} {value:#x}: {text}");
        }
        assert!(text.contains(&format!("CS ={:04x}", vcpu.segments[1].selector)), "{text}");
    }
    // Both have not begun at the same address.
    assert_ne!(registers[0], registers[1]);
    assert!(broker.admin().registers("other").unwrap_err().to_string().contains("no VM is named"));
}

#[test]
fn a_vm_runs_again_however_a_pause_ends() {
    // On a slow machine the broker is not to end a pause by itself.
    let broker = TestBroker::start_with(Limits { silence: FIRMWARE, ..Limits::default() });
    let Some(qemu) = start(&broker, "held") else { return };
    let mut monitor = qemu.monitor();
    for end in ["resume", "disconnect", "both"] {
        let mut admin = broker.admin();
        assert!(admin.pause("held").unwrap(), "{end}");
        assert!(admin.pause("held").unwrap(), "{end}");
        monitor.wait_status("paused");
        match end {
            "resume" => admin.resume("held").unwrap(),
            "disconnect" => drop(admin),
            _ => {
                let mut other = broker.admin();
                assert!(other.pause("held").unwrap());
                admin.resume("held").unwrap();
                assert_eq!(monitor.execute("query-status", json!({}))["status"], "paused");
                other.resume("held").unwrap();
            }
        }
        monitor.wait_status("running");
    }
    let mut admin = broker.admin();
    admin.pause("held").unwrap();
    monitor.execute("cont", json!({}));
    let error = admin.pause("held").unwrap_err();
    assert!(error.to_string().contains("runs again"), "{error}");
    assert!(admin.resume("held").is_err());
    // A target that is removed runs as well.
    let mut admin = broker.admin();
    admin.pause("held").unwrap();
    broker.admin().remove_target("held").unwrap();
    monitor.wait_status("running");
}

#[test]
fn a_client_that_is_silent_pauses_no_longer() {
    let silence = Duration::from_secs(10);
    let broker = TestBroker::start_with(Limits { silence, ..Limits::default() });
    let Some(qemu) = start(&broker, "silent") else { return };
    let mut admin = broker.admin();
    assert!(admin.pause("silent").unwrap());
    qemu.monitor().wait_status("running");
    drop(admin);
}

#[test]
fn a_vm_that_was_paused_before_stays_paused() {
    let broker = TestBroker::start();
    let Some(qemu) = start(&broker, "still") else { return };
    let mut monitor = qemu.monitor();
    monitor.execute("stop", json!({}));
    let mut admin = broker.admin();
    assert!(!admin.pause("still").unwrap());
    admin.resume("still").unwrap();
    drop(admin);
    broker.admin().remove_target("still").unwrap();
    wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    assert_eq!(monitor.execute("query-status", json!({}))["status"], "paused");
}

#[test]
fn a_vm_without_a_monitor_is_not_paused() {
    let broker = TestBroker::start();
    let _target = broker.target("alone");
    for error in
        [broker.admin().pause("alone").unwrap_err(), broker.admin().registers("alone").unwrap_err()]
    {
        let ClientError::Refused { message, .. } = &error else { panic!("{error}") };
        assert!(message.contains("no QMP connection"), "{message}");
    }
}

/// A daemon, killed on drop.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_vm_runs_again_after_its_broker_was_killed() {
    // Only for its directory, and for QEMU.
    let broker = TestBroker::start();
    let backend = "memory-backend-memfd,id=ram0,size=64M,share=on";
    let machine = ["-m", "64M", "-object", backend, "-machine", "q35,memory-backend=ram0"];
    let Some(qemu) = Qemu::start(&broker, "killed", &machine) else { return };
    let socket = broker.directory.path().join("daemon.sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmemd"));
    command.arg("--socket").arg(&socket).stdin(Stdio::null()).stderr(Stdio::null());
    let mut daemon = Daemon(command.spawn().unwrap());
    wait_long("the daemon to listen", || Admin::connect(&socket).is_ok());
    let mut admin = Admin::connect(&socket).unwrap();
    admin.add_target(&Which::Qmp { socket: qemu.qmp.clone(), pid: None }, None).unwrap();
    let mut monitor = qemu.monitor();
    assert!(admin.pause("killed").unwrap());
    assert_eq!(monitor.execute("query-status", json!({}))["status"], "paused");
    daemon.0.kill().unwrap();
    daemon.0.wait().unwrap();
    monitor.wait_status("running");
    // Nothing of the broker's keeps others from QEMU's monitor.
    wait_long("QEMU to answer others", || Qmp::connect(&qemu.qmp).is_ok());
}

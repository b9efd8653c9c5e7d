// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `kvmmemd`.

mod common;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kvmmem::host::HostLink;
use kvmmem_client::admin::{Admin, GrantRequest, KvmiPolicy, Span};
use kvmmem_client::vmm::{Rights, ViewCounters, VmmLink};
use rustix::process::{Pid, Signal, kill_process};

/// A running daemon, killed on drop.
struct Daemon(Child);

impl Daemon {
    fn start(socket: &Path, options: &[&str]) -> Self {
        let mut child = command(socket, options).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        log.read_line(&mut line).unwrap();
        assert!(line.contains("listening"), "{line}");
        // The pipe must not fill up, nor break.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self(child)
    }

    fn signal(mut self, signal: Signal) -> ExitStatus {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
        let deadline = Instant::now() + common::PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(socket: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmemd"));
    command.arg("--socket").arg(socket).args(options).env_remove("RUST_LOG");
    command
}

#[test]
fn it_serves_until_it_is_told_to_stop() {
    for signal in [Signal::TERM, Signal::INT] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("sub/kvmmemd.sock");
        let daemon = Daemon::start(&socket, &[]);
        assert_eq!(socket.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let mut admin = Admin::connect(&socket).unwrap();
        assert_eq!(admin.targets().unwrap(), []);
        assert_eq!(daemon.signal(signal).code(), Some(0));
        assert!(!socket.exists());
        assert!(admin.targets().is_err());
    }
}

#[test]
fn a_second_instance_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("kvmmemd.sock");
    let daemon = Daemon::start(&socket, &[]);
    let second = command(&socket, &[]).output().unwrap();
    assert_eq!(second.status.code(), Some(3));
    assert!(String::from_utf8(second.stderr).unwrap().contains("another broker serves"));
    assert!(Admin::connect(&socket).unwrap().targets().is_ok());
    drop(daemon);
}

#[test]
fn the_socket_of_one_that_was_killed_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("kvmmemd.sock");
    Daemon::start(&socket, &[]).signal(Signal::KILL);
    assert!(socket.metadata().unwrap().file_type().is_socket());
    let daemon = Daemon::start(&socket, &[]);
    assert!(Admin::connect(&socket).unwrap().targets().is_ok());
    assert_eq!(daemon.signal(Signal::TERM).code(), Some(0));
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kvmmemd.sock");
    std::fs::write(&path, "precious").unwrap();
    let output = command(&path, &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("not a socket"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let output = command(&path, &["--group", "no-such-group"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(command(&path, &["--nonsense"]).output().unwrap().status.code(), Some(2));
}

#[test]
fn a_group_is_let_in_and_the_audit_log_is_json() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("kvmmemd.sock");
    let audit = directory.path().join("audit.log");
    let group = rustix::process::getegid().as_raw().to_string();
    let daemon =
        Daemon::start(&socket, &["--group", &group, "--json", "--audit", audit.to_str().unwrap()]);
    assert_eq!(socket.metadata().unwrap().permissions().mode() & 0o777, 0o660);
    let unknown = "vsock:3:1".parse().unwrap();
    assert!(Admin::connect(&socket).unwrap().hook("nobody", &unknown).is_err());
    assert_eq!(daemon.signal(Signal::TERM).code(), Some(0));
    let log = std::fs::read_to_string(&audit).unwrap();
    let line: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!(line["event"], "refused");
    assert_eq!(line["pid"], std::process::id());
}

#[test]
fn the_audit_log_tells_who_got_used_and_lost_what() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("kvmmemd.sock");
    let audit = directory.path().join("audit.log");
    let daemon =
        Daemon::start(&socket, &["--audit", audit.to_str().unwrap(), "--kvmi-tokens", "ro"]);
    let tiger = VmmLink::connect(&socket, common::target("tiger"), Some(common::ram())).unwrap();
    let lion = VmmLink::connect(&socket, common::introspector("lion", 7), None).unwrap();
    let mut admin = Admin::connect(&socket).unwrap();
    assert_eq!(admin.policy("tiger", None).unwrap(), KvmiPolicy::ReadOnly);
    admin.policy("tiger", Some(KvmiPolicy::None)).unwrap();
    let spans = Some(vec![Span { gpa: 0x1000, len: 0x1000 }]);
    let label = Some("a \"label\"".to_owned());
    let request = GrantRequest { spans, label, uses: 2, ..common::request(Rights::ReadOnly) };
    let granted = admin.grant(&request).unwrap();
    let view = lion.attach(&granted.token, &common::caller(), false).unwrap().view;
    lion.detached(view, ViewCounters { seeks: 5, refused_writes: 6 });
    let (host, _) = HostLink::attach(&socket, &granted.token, false).unwrap();
    drop(host);
    lion.attach(&granted.token, &common::caller(), false).unwrap_err();
    common::wait_for("the view to end", || admin.grants().unwrap()[0].views.is_empty());
    admin.revoke(granted.grant).unwrap();
    drop((tiger, lion));
    assert_eq!(daemon.signal(Signal::TERM).code(), Some(0));

    assert_eq!(audit.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let log = std::fs::read_to_string(&audit).unwrap();
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let find = |event: &str, by: Option<&str>| {
        let is_it = |line: &&serde_json::Value| {
            line["event"] == event && by.is_none_or(|by| line["by"] == by)
        };
        lines.iter().find(is_it).unwrap_or_else(|| panic!("no {event}: {log}"))
    };
    assert!(lines.iter().all(|line| line["time"].as_str().unwrap().ends_with('Z')));
    assert!(!log.contains(&format!("{:016x}", granted.token.words()[0])));
    let (pid, uid) = (std::process::id(), rustix::process::getuid().as_raw());

    let got = find("granted", None);
    assert_eq!(
        (&got["name"], &got["grant"], &got["rights"]),
        (&"tiger".into(), &granted.grant.into(), &"ro".into())
    );
    assert_eq!(
        (&got["label"], &got["uses"], &got["ttl_ms"]),
        (&"a \"label\"".into(), &2.into(), &60_000.into())
    );
    assert_eq!(got["spans"], serde_json::json!(["0x1000..0x2000"]));
    assert_eq!((&got["pid"], &got["uid"]), (&pid.into(), &uid.into()));

    let used = find("attached", Some("lion"));
    assert_eq!(
        (&used["view"], &used["grant"], &used["name"]),
        (&view.into(), &granted.grant.into(), &"tiger".into())
    );
    assert_eq!(used["by_uuid"], common::uuid("lion").to_string());
    assert_eq!((&used["caller_pid"], &used["caller_uid"]), (&4711.into(), &1000.into()));
    assert_eq!((&used["caller_comm"], &used["rights"]), (&"scan".into(), &"ro".into()));
    assert_eq!(find("attached", Some("host"))["caller_pid"], pid);

    let lost = find("detached", Some("lion"));
    assert_eq!((&lost["view"], &lost["reason"]), (&view.into(), &"closed".into()));
    assert_eq!((&lost["seeks"], &lost["refused_writes"]), (&5.into(), &6.into()));
    assert_eq!(
        find("refused", Some("lion"))["reason"],
        "token is unknown, used, expired or revoked"
    );
    let revoked = find("revoked", None);
    assert_eq!((&revoked["grant"], &revoked["views"]), (&granted.grant.into(), &0.into()));
    assert_eq!(find("policy", None)["policy"], "none");
    assert_eq!(find("gone", None)["suppressed"], 0);
    assert_eq!(find("registered", None)["introspectable"], true);
}

#[test]
fn a_full_disk_does_not_stop_the_service() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("kvmmemd.sock");
    let daemon = Daemon::start(&socket, &["--audit", "/dev/full"]);
    let _tiger = VmmLink::connect(&socket, common::target("tiger"), Some(common::ram())).unwrap();
    assert_eq!(Admin::connect(&socket).unwrap().targets().unwrap().len(), 1);
    assert_eq!(daemon.signal(Signal::TERM).code(), Some(0));
    let nowhere = command(&socket, &["--audit", "/nowhere/audit.log"]).output().unwrap();
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(String::from_utf8(nowhere.stderr).unwrap().contains("/nowhere/audit.log"));
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs for running virtual machines, with processes that are not one.

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kvmmem_client::vmm::Region;

use crate::common::Host;
use crate::common::qemu::Qemu;

fn host() -> Host {
    Host::start(&[Region { gpa: 0, len: 4 << 20, offset: 0, file: 0 }])
}

#[test]
fn what_runs_here_is_listed_without_a_broker() {
    let host = host();
    let mut command = host.command(&["host", "discover", "--json"]);
    let output = command.env("KVMMEM_BROKER", "/nowhere/at/all").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let found: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(found["pid"].is_u64() && found["target"] == false, "{line}");
    }
}

#[test]
fn what_cannot_be_added_or_removed_is_said() {
    let host = host();
    let this = std::process::id().to_string();
    let socket = format!("{this}.qmp");
    let cases: [(&[&str], i32, &str); 6] = [
        (&["add", "--pid", &this], 1, "which is not a VMM that kvmmem knows"),
        (&["add", "--qmp", &socket], 1, &socket),
        (&["add", "--libvirt", "nothing"], 1, "libvirt runs no VM named \"nothing\""),
        (&["add"], 2, "--pid, --qmp or --libvirt"),
        (&["add", "--pid", "1", "--libvirt", "x"], 2, "cannot be used with"),
        (&["remove", "victim"], 1, "was registered by its own VMM"),
    ];
    for (arguments, code, words) in cases {
        let output = host.command(&[&["target"], arguments].concat()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(words), "{arguments:?}: {text}");
    }
}

/// With `--json` each line on standard error is an object: an error, or a line of the log.
fn objects(stderr: &str) {
    for line in stderr.lines() {
        let object: serde_json::Value =
            serde_json::from_str(line).unwrap_or_else(|_| panic!("{stderr}"));
        assert!(object["level"].is_string() != object["error"].is_string(), "{line}");
    }
}

#[test]
fn root_needs_no_broker() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!(
            "skipped: a broker of the command's own needs root: run the tests as root"
        );
    }
    let directory = tempfile::tempdir().unwrap();
    let (name, qmp) = (format!("alone-{}", std::process::id()), directory.path().join("qmp"));
    let more = ["-m", "64", "-qmp", &format!("unix:{},server=on,wait=off", qmp.display())];
    let Some(qemu) = Qemu::start(&name, &more) else { return };
    let left = tempfile::tempdir().unwrap();
    let run = |target: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
        command.args(["--json", "attach", "--target", target]).stdin(Stdio::null());
        command.env_remove("RUST_LOG").env("TMPDIR", left.path());
        let output = command.env("KVMMEM_BROKER", directory.path().join("none")).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let ways = [name.clone(), format!("pid:{}", qemu.0.id()), format!("qmp:{}", qmp.display())];
    // The firmware needs a while to leave the tables that confirm where the RAM is, and QEMU to
    // listen.
    let deadline = Instant::now() + Duration::from_secs(60);
    while ways.iter().any(|way| run(way).0 != Some(0)) {
        assert!(Instant::now() < deadline, "{:?}", ways.each_ref().map(|way| run(way)));
    }
    for way in &ways {
        let (code, stdout, stderr) = run(way);
        assert_eq!(code, Some(0), "{way}: {stderr}");
        let attached: serde_json::Value =
            serde_json::from_str(stdout.lines().next().unwrap()).unwrap();
        assert_eq!(
            (&attached["event"], &attached["writable"]),
            (&"attached".into(), &false.into())
        );
        assert!(
            std::path::Path::new("/run/systemd/journal/socket").exists()
                || stderr.contains("\"event\":\"granted\"")
                    && stderr.contains("\"label\":\"kvmmem attach\""),
            "{way}: {stderr}"
        );
        // The command waits for the last line.
        assert!(
            std::path::Path::new("/run/systemd/journal/socket").exists()
                || stderr.contains("\"event\":\"detached\""),
            "{way}: {stderr}"
        );
        objects(&stderr);
    }
    // Its firmware is not Linux: a row with the reason.
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
    command.args(["--json", "info", "--all"]).stdin(Stdio::null()).env_remove("RUST_LOG");
    command.env("TMPDIR", left.path()).env("KVMMEM_BROKER", directory.path().join("none"));
    let output = command.output().unwrap();
    let rows = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<serde_json::Value> =
        rows.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
    let row = rows.iter().find(|row| row["name"] == name.as_str()).unwrap();
    assert_eq!((output.status.code(), row["pid"].as_u64()), (Some(0), Some(qemu.0.id().into())));
    assert!(row["error"].as_str().unwrap().contains("no Linux kernel was found"), "{row}");
    // A target without a UUID of its own is recognised by its process, so that a dump continues
    // that another command began.
    let attached = |way: &str| -> serde_json::Value {
        serde_json::from_str(run(way).1.lines().next().unwrap()).unwrap()
    };
    let (one, other) = (attached(&ways[0]), attached(&ways[1]));
    assert_eq!((&one["target"], &one["generation"]), (&other["target"], &other["generation"]));
    let file = directory.path().join("dump");
    let dump = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
        command.args(["--json", "dump", file.to_str().unwrap(), "--target", &name]).args(more);
        command.env_remove("RUST_LOG").env("TMPDIR", left.path()).stdin(Stdio::null());
        let output = command.env("KVMMEM_BROKER", directory.path().join("none")).output().unwrap();
        assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let whole = dump(&[]);
    // As a command leaves it that was interrupted at 1 MiB.
    let hex =
        |text: &serde_json::Value| u64::from_str_radix(&text.as_str().unwrap()[2..], 16).unwrap();
    let range = |line: &serde_json::Value| {
        let start = hex(&line["gpa"]);
        serde_json::json!({"start": start, "end": start + line["len"].as_u64().unwrap()})
    };
    let ranges: Vec<_> = whole["ranges"].as_array().unwrap().iter().map(range).collect();
    let checkpoint = serde_json::json!({
        "version": 2, "uuid": whole["target"], "instance": whole["instance"], "format": "raw", "ranges": ranges,
        "next": 1 << 20, "data_bytes": 0, "unreadable": [], "started_ms": whole["started_ms"], "vmcoreinfo": null,
        "is_stale": false,
    });
    std::fs::remove_file(directory.path().join("dump.json")).unwrap();
    std::fs::write(directory.path().join("dump.part"), checkpoint.to_string()).unwrap();
    let resumed = dump(&["--resume"]);
    assert_eq!((&resumed["resumed"], &resumed["target"]), (&true.into(), &whole["target"]));
    assert_eq!(resumed["bytes"], whole["bytes"]);
    let (code, _, stderr) = run("no-such-vm");
    assert_eq!(code, Some(1));
    objects(&stderr);
    assert!(stderr.contains("host discover"), "{stderr}");
    assert_eq!(std::fs::read_dir(left.path()).unwrap().count(), 0, "something is left");
    // Every form of a name means the target of the broker.
    let host = host();
    let pid = qemu.0.id().to_string();
    let added = host.ask(&["target", "add", "--pid", &pid, "--name", "renamed"]);
    let uuid = added.split(['(', ')']).nth(1).unwrap();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&qmp, &link).unwrap();
    for way in [&ways[1], &ways[2], &format!("qmp:{}", link.display())] {
        let attached = host.ask(&["attach", "--target", way]);
        assert!(attached.contains(uuid), "{way}: {attached}");
    }
}

#[test]
fn a_broker_that_is_named_is_meant_and_one_that_runs_is_asked() {
    let host = host();
    let none = host.path("none");
    let this = format!("pid:{}", std::process::id());
    let cases: [(&[&str], &str); 4] = [
        (
            &["attach", "--target", "victim", "--broker", none.to_str().unwrap()],
            "is kvmmemd running",
        ),
        (&["attach", "--target", "pid:1"], "`kvmmem host discover` prints the command"),
        (&["attach", "--target", "qmp:/run/a b"], "kvmmem target add --qmp '/run/a b'"),
        (&["attach", "--target", "libvirt:web"], "kvmmem target add --libvirt web"),
    ];
    for (arguments, words) in cases {
        let ended = host.run(arguments);
        assert_eq!(ended.code, Some(1), "{arguments:?}");
        assert!(ended.stderr.contains(words), "{arguments:?}: {}", ended.stderr);
    }
    // The VMM of the target is this process.
    assert!(host.ask(&["attach", "--target", &this]).contains("read-only"));
}

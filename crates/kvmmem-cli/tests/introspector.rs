// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs for introspectors under a stock QEMU, with processes that are not a QEMU; and with
//! this machine's QEMU, if it has one.

mod common;

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use kvmmem_client::vmm::Region;

use crate::common::Host;
use crate::common::qemu::wait_status;

fn host() -> Host {
    Host::start(&[Region { gpa: 0, len: 4 << 20, offset: 0, file: 0 }])
}

#[test]
fn what_cannot_be_added_or_removed_is_said() {
    let host = host();
    let this = std::process::id().to_string();
    let socket = format!("{this}.qmp");
    let cases: [(&[&str], i32, &str); 8] = [
        (&["add", "--pid", &this], 1, "is not QEMU"),
        (&["add", "--qmp", &socket], 1, &socket),
        (&["add", "--libvirt", "nothing"], 1, "libvirt runs no VM named \"nothing\""),
        (&["add"], 2, "--pid, --qmp or --libvirt"),
        (&["add", "--pid", "1", "--cid", "2"], 2, "--cid"),
        (&["add", "--pid", "1", "--on-silence", "shrug"], 2, "report, pause, kill"),
        (&["remove", "victim"], 1, "was not added as an introspector"),
        (&["remove", "nobody"], 1, "no VM is named \"nobody\""),
    ];
    for (arguments, code, words) in cases {
        let output = host.command(&[&["introspector"], arguments].concat()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(words), "{arguments:?}: {text}");
    }
}

#[test]
fn what_qemu_needs_is_printed_for_a_shell_and_as_json() {
    let host = host();
    let text = |arguments: &[&str]| {
        let output = host.command(&[&["qemu-args"], arguments].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let printed = text(&["--name", "lion", "--cid", "9", "--views", "1"]);
    let json: serde_json::Value =
        serde_json::from_str(&text(&["--json", "--name", "lion", "--cid", "9", "--views", "1"]))
            .unwrap();
    let words: Vec<&str> =
        json["arguments"].as_array().unwrap().iter().filter_map(|word| word.as_str()).collect();
    // As a shell splits what $(kvmmem qemu-args) gives.
    assert_eq!(printed.split_whitespace().collect::<Vec<_>>(), words);
    assert!(words.contains(&"vhost-vsock-pci,guest-cid=9"), "{words:?}");
    assert!(words.contains(&"unix:/run/lion.qmp,server=on,wait=off"), "{words:?}");
    let xml = text(&["--libvirt", "--name", "lion"]);
    assert!(
        xml.contains("/var/lib/libvirt/qemu/lion.monitor") && xml.contains("ua-kvmmem1"),
        "{xml}"
    );
}

/// A QEMU, ended on drop.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// This machine's QEMU with what `qemu-args` prints but the vsock device, which needs a driver of
/// the host.
fn qemu(host: &Host, socket: &Path, machine: &str) -> Option<Qemu> {
    let arguments = ["qemu-args", "--machine", machine, "--qmp", socket.to_str().unwrap()];
    let printed = host.command(&arguments).output().unwrap().stdout;
    let printed = String::from_utf8(printed).unwrap();
    let lines = printed.lines().filter(|line| !line.contains("vhost-vsock"));
    let started = Command::new("qemu-system-x86_64")
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-accel",
            "tcg",
            "-m",
            "64",
            "-S",
            "-machine",
            machine,
        ])
        .args(["-name", "lion"])
        .args(lines.flat_map(|line| line.split(' ')))
        .stdin(Stdio::null())
        .spawn();
    match started {
        Ok(process) => Some(Qemu(process)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // Past the test harness, which would keep it to itself.
            std::io::stderr()
                .write_all(
                    b"skipped: no qemu-system-x86_64: install it (Debian: qemu-system-x86)\n",
                )
                .unwrap();
            None
        }
        Err(error) => panic!("cannot start QEMU: {error}"),
    }
}

#[test]
fn a_qemu_becomes_an_introspector_and_is_none_again() {
    becomes_an_introspector("q35", |count| count == "2");
    // Its slots are those of the root bus.
    becomes_an_introspector("pc", |count| count.parse::<u32>().unwrap() > 2);
}

fn becomes_an_introspector(machine: &str, is_count: fn(&str) -> bool) {
    let host = host();
    // A path of a socket is short.
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let Some(_qemu) = qemu(&host, &socket, machine) else { return };
    // It listens before it answers.
    wait_status(&socket, "prelaunch");
    let socket = socket.to_str().unwrap();
    let run = |arguments: &[&str]| {
        let output = host.command(arguments).output().unwrap();
        let (out, err) = (output.stdout, output.stderr);
        let text = [out, err].map(|text| String::from_utf8(text).unwrap()).concat();
        (output.status.success(), text)
    };
    let (is_added, text) = run(&["introspector", "add", "--qmp", socket]);
    assert!(!is_added && text.contains("vhost-vsock-pci"), "{text}");
    let (is_added, text) = run(&["introspector", "add", "--qmp", socket, "--cid", "4711"]);
    assert!(is_added && text.starts_with("lion (") && text.contains("context id 4711"), "{text}");
    let count = text.split_once("  it has ").unwrap().1.split(' ').next().unwrap();
    assert!(is_count(count), "{text}");
    let (_, all) = run(&["doctor", "--role", "host"]);
    let free = format!("lion, context id 4711: {count} of {count} slots for views are free");
    assert!(all.contains(&free), "{all}");
    let (_, list) = run(&["introspector", "list"]);
    assert!(
        list.starts_with("NAME ") && list.contains(&format!("  {count} of {count}\n")),
        "{list}"
    );
    let slots = format!("\"slots\":{{\"free\":{count},\"count\":{count},\"retired\":[]}}");
    assert!(run(&["introspector", "list", "--json"]).1.contains(&slots));
    // It is not listed as a target.
    assert!(!run(&["target", "list"]).1.contains("lion"));
    let (is_removed, text) = run(&["introspector", "remove", "lion", "--json"]);
    assert!(is_removed && text == "{\"introspector\":\"lion\",\"removed\":true}\n", "{text}");
    assert!(!run(&["introspector", "remove", "lion"]).0);
}

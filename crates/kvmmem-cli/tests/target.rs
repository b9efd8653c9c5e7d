// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs for virtual machines that run already, with what is none.

mod common;

use kvmmem_broker::link::Region;

use crate::common::Host;

fn host() -> Host {
    Host::start(&[Region { gpa: 0, len: 4 << 20, offset: 0, file: 0 }])
}

#[test]
fn what_runs_here_is_listed_without_a_broker() {
    let host = host();
    let mut command = host.command(&["targets", "--discover", "--json"]);
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
        (&["add", "--pid", &this], 1, "which is no VMM that kvmmem knows"),
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

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line with a broker and a registered virtual machine, all on this host: list, hook,
//! read, write, remove the hook.

mod common;

use std::process::{Child, Output};

use kvmmem_client::vmm::Region;

use crate::common::{Host, UUID};

const MEMORY: u64 = 4 << 20;

fn host() -> Host {
    Host::start(&[Region { gpa: 0, len: MEMORY, offset: 0, file: 0 }])
}

/// Starts a tool's verb.
fn tool(host: &Host, arguments: &[&str]) -> Child {
    let endpoint = host.endpoint();
    host.command(&[arguments, &["--listen", &endpoint]].concat()).spawn().unwrap()
}

fn finish(child: Child) -> Output {
    child.wait_with_output().unwrap()
}

#[test]
fn a_hooked_target_is_listed_read_and_written() {
    let host = host();
    rustix::io::pwrite(host.ram.fd(), b"hello from the target", 0x20_0ff8).unwrap();
    let endpoint = host.endpoint();
    assert_eq!(
        host.ask(&["hook", "add", "victim", &endpoint]),
        format!("victim is hooked to {endpoint}\n"),
    );

    let output = finish(tool(&host, &["read", "0x200ff8", "21", "--raw"]));
    assert_eq!(
        output.stdout,
        b"hello from the target",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    let output = finish(tool(&host, &["write", "0x3ffffe", "abcd"]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut bytes = [0; 2];
    rustix::io::pread(host.ram.fd(), &mut bytes, 0x3f_fffe).unwrap();
    assert_eq!(bytes, [0xab, 0xcd]);

    let output = finish(tool(&host, &["read", "0x3fffff", "2"]));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("gpa 0x400000"), "{text}");

    let text = host.ask(&["target", "list"]);
    for word in ["victim", &UUID.to_string(), "4 MiB"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&host.ask(&["--json", "target", "list"])).unwrap();
    assert_eq!(json["hooks"][0]["endpoint"], endpoint.as_str());
    assert_eq!(json["memory_bytes"], MEMORY);

    // The UUID names it as well.
    let listed = host.ask(&["hook", "list"]);
    assert!(listed.contains("victim") && listed.contains(&endpoint), "{listed}");
    let json = host.ask_json(&["hook", "list"]);
    assert_eq!((&json["target"], &json["endpoint"]), (&"victim".into(), &endpoint.as_str().into()));
    host.ask(&["hook", "remove", &UUID.to_string(), &endpoint]);
    assert_eq!(host.ask(&["hook", "list"]), "there are no hooks\n");
    let introspectors = host.ask(&["introspector", "list"]);
    assert!(introspectors.starts_with("there are no introspectors"), "{introspectors}");
}

#[test]
fn a_target_that_is_not_there_is_named() {
    let host = host();
    let endpoint = host.endpoint();
    for verb in ["add", "remove"] {
        let output = finish(host.command(&["hook", verb, "nobody", &endpoint]).spawn().unwrap());
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(text.contains("nobody"), "{text}");
    }
}

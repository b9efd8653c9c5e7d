// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `watch`.

use rustix::process::Signal;

use crate::attach::Running;
use crate::common::signal;
use crate::host;

#[test]
fn changes_are_told_as_lines() {
    let host = host();
    host.put(0x3f_fff0, b"before the border");
    let token = host.grant(&[]).1;
    let mut watch = Running::start(&host, &token, &["watch", "0x3ffff0", "0x20", "--interval", "10ms"]);
    assert!(watch.line().ends_with("|before the borde|\n"));
    assert!(watch.line().ends_with("|r...............|\n"));
    host.put(0x40_0001, b"!");
    let line = watch.line();
    assert!(line.contains("  000000400000  72 21 00") && !line.contains('\x1b'), "{line}");
    signal(&watch.child, Signal::INT);
    assert_eq!(watch.end(), (Some(0), String::new()));
}

#[test]
fn changes_are_told_as_objects_until_the_grant_is_taken_back() {
    let host = host();
    let (grant, token) = host.grant(&[]);
    let mut watch = Running::start(&host, &token, &["watch", "0x1000", "64", "--interval", "10ms", "--json"]);
    let memory = watch.object();
    assert_eq!((&memory["event"], &memory["hex"]), (&"memory".into(), &"00".repeat(64).into()));
    host.put(0x1010, b"\xaa");
    let changed = watch.object();
    assert_eq!((&changed["event"], &changed["gpa"]), (&"changed".into(), &0x1010.into()));
    assert_eq!((&changed["from"], &changed["to"]), (&"00".into(), &"aa".into()));
    host.ask(&["revoke", &grant]);
    let (code, stderr) = watch.end();
    assert_eq!(code, Some(1));
    assert!(stderr.contains("taken back"), "{stderr}");
}

#[test]
fn so_many_looks_are_taken_as_wanted() {
    let host = host();
    let ended = host.look(&[], &["watch", "0", "16", "--interval", "1ms", "--count", "3"]);
    assert_eq!((ended.code, ended.stdout.lines().count()), (Some(0), 1));
    let cases: [(&[&str], i32, &str); 5] = [
        (&["0", "0"], 1, "LEN"),
        (&["0", "2M"], 1, "LEN"),
        (&["0xffffffffffffffff", "2"], 1, "end of the address space"),
        (&["0", "16", "--interval", "5"], 2, "500ms"),
        (&["8M", "16"], 2, "0x1000"),
    ];
    for (arguments, code, word) in cases {
        let ended = host.look(&[], &[&["watch"], arguments].concat());
        assert_eq!(ended.code, Some(code), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(word), "{arguments:?}: {}", ended.stderr);
    }
    let ended = host.look(&[], &["watch", "0x7ffff8", "16"]);
    assert!(ended.code == Some(1) && ended.stderr.contains("gpa 0x800000"), "{}", ended.stderr);
}

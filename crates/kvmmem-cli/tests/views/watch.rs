// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `watch`.

use std::fs::File;
use std::io::Read;

use rustix::fs::{Mode, OFlags, open};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::attach::Running;
use crate::common::{finish, signal};
use crate::host;

#[test]
fn changes_are_told_as_lines() {
    let host = host();
    host.put(0x3f_fff0, b"before the border");
    let token = host.grant(&[]).1;
    let mut watch =
        Running::start(&host, &token, &["watch", "0x3ffff0", "0x20", "--interval", "10ms"]);
    assert!(watch.line().ends_with("|before the borde|\n"));
    assert!(watch.line().ends_with("|r...............|\n"));
    host.put(0x40_0001, b"!");
    let line = watch.line();
    assert!(line.contains("  000000400000  72 21 00") && !line.contains('\x1b'), "{line}");
    signal(&watch.child, Signal::INT);
    assert_eq!(watch.end(), (Some(0), String::new()));
}

#[test]
fn changes_are_reported_as_objects_until_the_grant_is_revoked() {
    let host = host();
    let (grant, token) = host.grant(&[]);
    let mut watch =
        Running::start(&host, &token, &["watch", "0x1000", "64", "--interval", "10ms", "--json"]);
    let memory = watch.object();
    assert_eq!((&memory["event"], &memory["hex"]), (&"memory".into(), &"00".repeat(64).into()));
    host.put(0x1010, b"\xaa");
    let changed = watch.object();
    assert_eq!((&changed["event"], &changed["gpa"]), (&"changed".into(), &"0x1010".into()));
    assert_eq!((&changed["from"], &changed["to"]), (&"00".into(), &"aa".into()));
    host.ask(&["grant", "revoke", &grant]);
    let (code, stderr) = watch.end();
    assert_eq!(code, Some(1));
    assert!(stderr.contains("revoked"), "{stderr}");
}

#[test]
fn so_many_looks_are_taken_as_wanted() {
    let host = host();
    let ended = host.look(&[], &["watch", "0", "16", "--interval", "1ms", "--count", "3"]);
    assert_eq!((ended.code, ended.stdout.lines().count()), (Some(0), 1));
    let cases: [(&[&str], i32, &str); 5] = [
        (&["0", "0"], 2, "LEN"),
        (&["0", "2M"], 2, "LEN"),
        (&["0xffffffffffffffff", "2"], 2, "end of the address space"),
        (&["0", "16", "--interval", "5"], 2, "500ms"),
        (&["8M", "16"], 1, "0x800000..0x801000"),
    ];
    for (arguments, code, word) in cases {
        let ended = host.look(&[], &[&["watch"], arguments].concat());
        assert_eq!(ended.code, Some(code), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(word), "{arguments:?}: {}", ended.stderr);
    }
    let ended = host.look(&[], &["watch", "0x7ffff8", "16"]);
    assert!(ended.code == Some(1) && ended.stderr.contains("gpa 0x800000"), "{}", ended.stderr);
}

#[test]
fn on_a_terminal_the_picture_stays_in_place() {
    let host = host();
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let window = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&terminal, window).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let screen =
        open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();

    let mut watch =
        host.view(&host.grant(&[]).1, &["watch", "0x1000", "0x30", "--interval", "10ms"]);
    let child = watch.env("TERM", "xterm").env_remove("NO_COLOR").stdout(screen).spawn().unwrap();
    // It holds the screen's file.
    drop(watch);
    let mut terminal = File::from(terminal);
    let mut until = |words: &str| {
        let mut text = String::new();
        while !text.contains(words) {
            let mut byte = [0];
            terminal.read_exact(&mut byte).unwrap();
            text.push(char::from(byte[0]));
        }
        text
    };
    let first = until("\x1b[3A");
    assert_eq!(first.matches("00  |................|\r\n").count(), 3, "{first:?}");
    host.put(0x1021, b"A");
    let changed = until("\x1b[0m");
    assert!(changed.ends_with("000000001020  00 \x1b[1m\x1b[31m41\x1b[0m"), "{changed:?}");
    signal(&child, Signal::INT);
    assert_eq!(finish(child).code, Some(0));
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs on a target whose VMM keeps its RAM to itself: all that only copy do as ever.

use std::os::unix::fs::FileExt;

use crate::REGIONS;
use crate::attach::Running;
use crate::common::Host;

#[test]
fn a_scan_finds_what_a_dump_holds() {
    let host = Host::start_private(&REGIONS);
    let places = [0x3_fffd, 0x3f_fffc, (20 << 20) - 6];
    for place in places {
        host.put(place, b"needle");
    }
    let ended = host.look(&[], &["scan", "--text", "needle"]);
    let found: Vec<&str> =
        ended.stdout.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(found, places.map(|place| format!("{place:012x}")), "{}", ended.stderr);
    let file = host.path("dump");
    let ended = host.look(&[], &["dump", file.to_str().unwrap()]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let dump = std::fs::File::open(file).unwrap();
    for place in places {
        let mut bytes = [0; 6];
        dump.read_exact_at(&mut bytes, place).unwrap();
        assert_eq!(&bytes, b"needle");
    }
}

#[test]
fn changes_are_reported_until_the_grant_is_revoked() {
    let host = Host::start_private(&REGIONS);
    let (grant, token) = host.grant(&[]);
    let mut watch = Running::start(&host, &token, &["watch", "0x1000", "16", "--interval", "10ms"]);
    assert!(watch.line().ends_with("|................|\n"));
    host.put(0x1001, b"!");
    let line = watch.line();
    assert!(line.contains("00 21 00"), "{line}");
    let revoked = host.ask(&["grant", "revoke", &grant]);
    let (code, stderr) = watch.end();
    assert!(code == Some(1) && stderr.contains("revoked"), "{code:?} {stderr} {revoked}");
}

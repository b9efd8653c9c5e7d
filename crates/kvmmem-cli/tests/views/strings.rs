// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `strings`.

use crate::host;

#[test]
fn the_text_of_a_target_and_of_its_dump_is_the_same() {
    let host = host();
    host.put(0x1000, b"hello, target\0abc\0");
    // Over a piece of the search, and over two regions that lie apart in the file.
    host.put((256 << 10) - 3, b"needle");
    host.put((4 << 20) - 5, b"w\0i\0d\0e\0r\0\x1b[2J");
    host.put((20 << 20) - 4, b"last");
    // Before and after a hole these are not neighbours.
    host.put((8 << 20) - 2, b"no");
    host.put(16 << 20, b"pe");
    let expected = "\
000000001000  ascii  hello, target
00000003fffd  ascii  needle
0000003ffffb  utf16  wider
0000013ffffc  ascii  last
";
    for threads in ["1", "3"] {
        let ended = host.look(&[], &["strings", "--threads", threads]);
        assert_eq!(
            (ended.code, ended.stdout.as_str(), ended.stderr.as_str()),
            (Some(0), expected, "")
        );
    }
    let dump = host.path("dump.raw");
    let dump = dump.to_str().unwrap();
    assert_eq!(host.look(&[], &["dump", dump]).code, Some(0));
    assert_eq!(host.run(&["strings", "--file", dump]).stdout, expected);

    let ended = host.run(&["strings", "--file", dump, "-e", "utf16", "-n", "2", "--json"]);
    let found: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    let is = (&found["gpa"], &found["encoding"], &found["text"]);
    assert_eq!(is, (&"0x3ffffb".into(), &"utf16".into(), &"wider".into()));
    let ended = host.run(&["strings", "--file", dump, "-n", "3", "--range", "..0x2000"]);
    assert_eq!(ended.stdout.lines().last(), Some("00000000100e  ascii  abc"));
    let ended = host.run(&["strings", "--file", "/nonexistent/dump"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("/nonexistent/dump"), "{}", ended.stderr);
}

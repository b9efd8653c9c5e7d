// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Addresses that a token does not reach: the mistake costs no use of it.

use crate::common::finish;
use crate::host;

#[test]
fn a_range_that_reaches_no_memory_does_not_use_the_token_up() {
    let host = host();
    host.put(5 << 20, b"needle");
    let path = host.path("dump");
    let path = path.to_str().unwrap();
    let (_, token) = host.grant(&["--range", "4M..17M", "--rw"]);
    // The first is a hole in the target's RAM, the others are not granted.
    let cases: [(&[&str], i32, &str); 6] = [
        (&["dump", path, "--range", "8M..9M"], 1, "0x800000..0x900000"),
        (&["dump", path, "--range", "5M..6M", "--range", "18M..19M"], 1, "0x1200000..0x1300000"),
        (&["scan", "--text", "needle", "--range", "1M..2M"], 2, "0x100000..0x200000"),
        (&["watch", "0x10", "16"], 1, "0x0..0x1000"),
        (&["read", "17M", "0x1001"], 1, "0x1100000..0x1102000"),
        (&["write", "0x3fffff", "00"], 1, "0x3ff000..0x400000"),
    ];
    for (arguments, code, range) in cases {
        let ended = finish(host.view(&token, arguments).spawn().unwrap());
        assert_eq!(ended.code, Some(code), "{arguments:?}: {}", ended.stderr);
        for words in [range, "0x400000..0x800000, 0x1000000..0x1100000", "not used"] {
            assert!(ended.stderr.contains(words), "{arguments:?}: {}", ended.stderr);
        }
    }
    assert!(!host.path("dump").exists());
    let listed = host.ask_json(&["grant", "list"]);
    assert_eq!((&listed["state"], &listed["uses_left"]), (&"active".into(), &1.into()), "{listed}");
    let ended = finish(
        host.view(&token, &["scan", "--text", "needle", "--range", "1M..6M"]).spawn().unwrap(),
    );
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("500000"), "{}", ended.stdout);
    // Without a token the error is about the target.
    let ended = host.run(&["read", "--target", "victim", "8M", "16"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("victim: range 0x800000..0x801000 holds no memory of it"),
        "{}",
        ended.stderr
    );
    assert!(!ended.stderr.contains("token") && !ended.stderr.contains(".sock"), "{}", ended.stderr);
}

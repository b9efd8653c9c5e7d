// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `scan`.

use std::os::unix::fs::FileExt;

use kvmmem_client::vmm::Region;

use crate::attach::Running;
use crate::common::{Host, finish};
use crate::{host, large};

/// The addresses in the output.
fn places(stdout: &str) -> Vec<u64> {
    let lines = stdout.lines();
    lines
        .map(|line| u64::from_str_radix(line.split_whitespace().next().unwrap(), 16).unwrap())
        .collect()
}

#[test]
fn matches_are_found_wherever_they_lie_and_sorted() {
    let host = host();
    // At both ends, across a worker's piece, across adjacent regions, and in the last region.
    let expected = [0, 0x3_fffd, 0x3f_fffc, (16 << 20) + 0x1234, (20 << 20) - 6];
    for place in expected {
        host.put(place, b"needle");
    }
    // Before and after the hole these are not neighbours.
    host.put((8 << 20) - 3, b"nee");
    host.put(16 << 20, b"dle");
    let before = host.allocated();
    for threads in ["1", "4"] {
        let ended = host.look(&[], &["scan", "--text", "needle", "--threads", threads]);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
        assert_eq!(places(&ended.stdout), expected);
    }
    assert!(host.look(&[], &["scan", "6e 65 ?? 64"]).stdout.contains("6e 65 65 64 6c 65"));
    assert_eq!(host.allocated(), before, "the scan inflates the target");

    let ended = host.look(&[], &["scan", "--text", "needle", "--max", "2"]);
    assert_eq!(places(&ended.stdout), expected[..2]);
    let ended = host
        .look(&[], &["scan", "--text", "needle", "--range", "0x40000..16M", "--range", "17M..20M"]);
    assert_eq!(places(&ended.stdout), [expected[2], expected[4]]);
    for verb in [["scan", "--text=needle"], ["strings", "--min=6"]] {
        let ended = host.look(&[], &[&verb[..], &["--range", "7M..12M"]].concat());
        let words =
            "warning: the view does not reach all of --range: 0x800000..0xc00000 is left out";
        assert!(ended.stderr.starts_with(words), "{}", ended.stderr);
    }
    let ended = host.look(&["--range", "4M..17M"], &["scan", "--text", "needle"]);
    assert_eq!(places(&ended.stdout), [expected[3]]);
}

#[test]
fn several_patterns_are_named_in_both_forms() {
    let host = host();
    host.put(0x1000, "Grüße".as_bytes());
    host.put(0x2000, b"k\0e\0y\0");
    let patterns = ["scan", "47 72 ?? ?? c3", "--text", "üß", "--utf16", "key"];
    let ended = host.look(&[], &patterns);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(places(&ended.stdout), [0x1000, 0x1002, 0x2000]);
    for (line, name) in lines.iter().zip(["47 72 ?? ?? c3", "üß", "key"]) {
        assert!(line.ends_with(name), "{line}");
    }
    let ended = host.look(&[], &[&patterns[..], &["--json"]].concat());
    let first: serde_json::Value =
        serde_json::from_str(ended.stdout.lines().next().unwrap()).unwrap();
    assert_eq!((&first["gpa"], &first["pattern"]), (&"0x1000".into(), &"47 72 ?? ?? c3".into()));
    assert!(first["hex"].as_str().unwrap().starts_with("4772c3bcc39f65"));
}

#[test]
fn exit_codes_are_those_of_grep() {
    let host = host();
    let ended = host.look(&[], &["scan", "--text", "needle"]);
    assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (Some(1), "", ""));
    let cases: [(&[&str], &[&str]); 11] = [
        (&["scan"], &["PATTERN"]),
        (&["scan", "????"], &["at least one byte"]),
        (&["scan", "abc"], &["pairs"]),
        (&["scan", "ab", "--ignore-case"], &["bytes have no case"]),
        (&["scan", "--regex", "a*"], &["everywhere"]),
        (&["scan", "ab", "--before", "8K"], &["at most 4096"]),
        (&["scan", "--patterns", "/nonexistent/list"], &["/nonexistent/list", "No such file"]),
        (
            &["scan", "--yara", "/nonexistent.yar"],
            &["error: cannot read the rules in /nonexistent.yar\n"],
        ),
        (&["scan", "ab", "--range", "0x10..0x20"], &["0x0..0x1000"]),
        (&["scan", "ab", "--range", "1M..3M", "--range", "2M..4M"], &["overlap"]),
        (&["scan", "ab", "--range", "8M..9M"], &["0x800000..0x900000", "0x1000000..0x1400000"]),
    ];
    for (arguments, words) in cases {
        let ended = host.look(&[], arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}: {}", ended.stderr);
        for word in words {
            assert!(ended.stderr.contains(word), "{arguments:?} {word}: {}", ended.stderr);
        }
    }
}

#[test]
fn a_scan_ends_with_the_grant() {
    let host = large();
    // More matches than a pipe takes: the scan waits for the reader when it has just begun.
    for page in 0..4096 {
        host.put(page * 0x1000, b"needle");
    }
    let (grant, token) = host.grant(&[]);
    let mut scan = Running::start(&host, &token, &["scan", "--text", "needle", "--threads", "1"]);
    assert!(scan.line().starts_with("000000000000  6e 65"));
    host.ask(&["grant", "revoke", &grant]);
    let (code, stderr) = scan.end();
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("the scan ended early") && stderr.contains("revoked"), "{stderr}");
}

#[test]
fn rules_match_in_both_forms() {
    let host = host();
    // Over two pieces of the search, and in the last region.
    let places = [0x1000, (20 << 20) - 6];
    places.iter().for_each(|place| host.put(*place, b"needle"));
    let file = host.path("rules.yar");
    std::fs::write(
        &file,
        "rule hay : tag { meta: author = \"me\" n = 3 strings: $a = \"needle\" $b = { 6c 65 00 } condition: #a == 2 and $b }
         rule always { condition: true }
         rule never { strings: $a = \"haystack\" condition: $a }",
    )
    .unwrap();
    let file = file.to_str().unwrap();
    let ended = host.look(&[], &["scan", "--yara", file]);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!((ended.code, ended.stderr.as_str(), lines.len()), (Some(0), "", 4), "{lines:?}");
    assert!(
        lines[0].starts_with("000000001000  6e 65 65") && lines[0].ends_with("hay $a"),
        "{lines:?}"
    );
    assert!(
        lines[1].starts_with("000000001004  6c 65 00") && lines[1].ends_with("hay $b"),
        "{lines:?}"
    );
    assert_eq!(lines[3], "always");

    let ended = host.look(&[], &["scan", "--yara", file, "--json"]);
    let first: serde_json::Value =
        serde_json::from_str(ended.stdout.lines().next().unwrap()).unwrap();
    assert_eq!(first["matches"][2]["gpa"], format!("{:#x}", places[1]));
    assert_eq!(first["matches"][2]["bytes"], "6e6565646c65");
    assert_eq!((&first["meta"]["n"], &first["tags"][0]), (&3.into(), &"tag".into()));

    std::fs::write(file, "rule never { strings: $a = \"haystack\" condition: $a }").unwrap();
    assert_eq!(host.look(&[], &["scan", "--yara", file]).code, Some(1));
    // Rules that do not compile cost no token.
    std::fs::write(file, "rule bad { condition: $a }").unwrap();
    let token = host.ask(&["grant", "create", "victim"]);
    let ended = finish(host.view(&token, &["scan", "--yara", file]).spawn().unwrap());
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("rules.yar:1:"), "{}", ended.stderr);
    assert_eq!(ended.stderr.matches("error").count(), 1, "{}", ended.stderr);
    assert_eq!(
        finish(host.view(&token, &["scan", "--text", "needle"]).spawn().unwrap()).code,
        Some(0)
    );
}

#[test]
fn expressions_and_lists_of_patterns_are_found() {
    let host = host();
    host.put(0x1000, b"mail: Me@Example.com");
    host.put((8 << 20) - 6, b"\x4a\x8bword");
    let list = host.path("list");
    std::fs::write(
        &list,
        "# mine\naddress regex [a-z]+@[a-z]+\\.com\ncode hex 4? 8b ?7\nword text WORD\n",
    )
    .unwrap();
    let arguments = ["scan", "-i", "--patterns", list.to_str().unwrap()];
    let ended = host.look(&[], &arguments);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let names: Vec<&str> =
        ended.stdout.lines().map(|line| line.rsplit(' ').next().unwrap()).collect();
    assert_eq!(names, ["address", "code", "word"]);
    assert_eq!(places(&ended.stdout), [0x1006, (8 << 20) - 6, (8 << 20) - 4]);
    let ended = host
        .look(&[], &["scan", "--regex", "[A-Z][a-z]@", "--before", "6", "--after", "20", "--json"]);
    let found: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&found["gpa"], &found["len"]), (&"0x1006".into(), &3.into()));
    assert_eq!(
        (&found["before"], &found["hex"]),
        (&"6d61696c3a20".into(), &"4d65404578616d706c652e636f6d000000000000000000".into())
    );
    let ended = host.look(&[], &["scan", "--text", "Example", "--before", "9", "--after", "7"]);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(lines[0], "0x1009, 7 bytes");
    assert!(
        lines[1].starts_with("000000001000  6d 61 69 6c")
            && lines[1].ends_with("|mail: Me@Example|"),
        "{lines:?}"
    );
    assert!(lines[2].starts_with("000000001010  2e 63 6f 6d"), "{lines:?}");
}

#[test]
fn a_dump_file_is_searched_as_its_target() {
    let host = host();
    for place in [0x1000, (4 << 20) - 3, (20 << 20) - 6] {
        host.put(place, b"needle");
    }
    let dump = host.path("dump.raw");
    let dump = dump.to_str().unwrap();
    assert_eq!(host.look(&[], &["dump", dump]).code, Some(0));
    let rules = host.path("rules.yar");
    std::fs::write(&rules, "rule hay { strings: $a = \"needle\" condition: #a == 3 }").unwrap();
    let searches: [&[&str]; 4] = [
        &["scan", "--text", "needle"],
        &["scan", "--regex", "ne+dle", "--range", "1M..8M"],
        &["scan", "--yara", rules.to_str().unwrap()],
        &["scan", "--text", "haystack"],
    ];
    for search in searches {
        let live = host.look(&[], search);
        let dead = host.run(&[search, &["--file", dump]].concat());
        assert_eq!(
            (dead.code, &dead.stdout, dead.stderr.as_str()),
            (live.code, &live.stdout, ""),
            "{search:?}"
        );
    }
    let ended = host.run(&["scan", "00", "--file", dump, "--target", "victim"]);
    assert_eq!(ended.code, Some(2));
}

#[test]
fn rules_that_nest_without_end_are_refused_in_one_line() {
    let host = host();
    host.put(0x1000, &[b'x'; 0x3000]);
    let file = host.path("rules.yar");
    let rules = file.to_str().unwrap();
    let nested = format!("rule a {{ condition: {} true }}", "not ".repeat(100_000));
    for (text, words) in
        [("include \"rules.yar\"", "includes itself"), (nested.as_str(), "max depth")]
    {
        std::fs::write(&file, text).unwrap();
        let ended = host.run(&["scan", "--yara", rules, "--target", "victim"]);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(
            ended.stderr.contains(words) && ended.stderr.lines().count() == 1,
            "{}",
            ended.stderr
        );
    }
    // A warning reports more matches than are kept.
    std::fs::write(&file, "rule any { strings: $a = /.*/ condition: $a }").unwrap();
    let ended = host.look(&[], &["scan", "--yara", rules, "--max", "1"]);
    assert_eq!((ended.code, ended.stdout.lines().count()), (Some(0), 1), "{}", ended.stdout);
    assert!(
        ended.stderr.contains("more matches of $a in rule any than are kept"),
        "{}",
        ended.stderr
    );
}

#[test]
fn memory_that_cannot_be_read_is_passed_over_and_named() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 << 20).unwrap();
    let page = [&b"the needle"[..], &[0xff; 0xff6]].concat();
    (0..8 << 20).step_by(0x1000).for_each(|at| file.write_all_at(&page, at).unwrap());
    let host = Host::start_file(&[Region { gpa: 0, len: 8 << 20, offset: 0, file: 0 }], &file);
    let rules = host.path("rules.yar");
    std::fs::write(
        &rules,
        "rule a { strings: $a = \"needle\" $zeros = { 00 00 00 00 } condition: any of them }",
    )
    .unwrap();
    let whole = 0x50_3000;
    file.set_len(whole).unwrap();
    let (threads, expected) = (["1", "3"], usize::try_from(whole / 0x1000).unwrap());
    for (what, count) in [
        (&["scan", "--text", "needle"][..], expected),
        (&["scan", "--regex", "[n]eedle"], expected),
        (&["scan", "--yara", rules.to_str().unwrap(), "--max", "10000"], expected),
        // It counts as zeros, which do not match.
        (&["scan", "00000000"], 0),
        (&["strings", "-n", "10"], expected),
    ] {
        for threads in threads {
            let ended = host.look(&[], &[what, &["--threads", threads]].concat());
            assert_eq!(ended.code, Some(3), "{what:?}: {}", ended.stderr);
            assert_eq!(ended.stdout.lines().count(), count, "{what:?}: {}", ended.stderr);
            let words =
                "3133440 bytes could not be read and were passed over, at 0x503000..0x800000: ";
            assert!(ended.stderr.contains(words), "{what:?}: {}", ended.stderr);
        }
    }
}

#[test]
fn as_many_patterns_as_a_file_holds_are_looked_for_at_once() {
    let host = host();
    let places = [0x1000, 0x3_fff8, 0x3f_fffc, (20 << 20) - 12];
    for (place, number) in places.iter().zip([7, 19_999, 3, 12_345]) {
        host.put(*place, format!("pattern{number:05}").as_bytes());
    }
    host.put(0x2000, &[0x4a, 0x01, 0xbf]);
    let list = host.path("patterns");
    let mut text = "nibbles hex 4? 01 ?f\nword regex pattern1[0-9]+\n".to_owned();
    (0..20_000).for_each(|number| text += &format!("p{number} text pattern{number:05}\n"));
    std::fs::write(&list, text).unwrap();
    let ended = host.look(&[], &["scan", "--patterns", list.to_str().unwrap()]);
    let names: Vec<&str> =
        ended.stdout.lines().filter_map(|line| line.split_whitespace().last()).collect();
    assert_eq!(
        names,
        ["p7", "nibbles", "word", "p19999", "p3", "word", "p12345"],
        "{}",
        ended.stderr
    );
    let ended = host.look(&[], &["scan", "--patterns", list.to_str().unwrap(), "--max", "2"]);
    assert_eq!(ended.stdout.lines().count(), 2, "{}", ended.stderr);
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `translate`, and `read --gva`.

use serde_json::Value;

use crate::common::Host;
use crate::host;

const CR3: u64 = 0x10_0000;

/// A 4 KiB page, a 2 MiB page and a 1 GiB page, all in the upper half, and the recursive entry that
/// some kernels use.
fn tables(host: &Host) {
    let entries = [
        (CR3 + 511 * 8, 0x10_1003_u64),
        (CR3 + 256 * 8, CR3 | 3),
        (0x10_1000 + 510 * 8, 0x10_2003),
        (0x10_1000 + 509 * 8, 0x8000_0000_4000_0083),
        (0x10_2000, 0x10_3007),
        (0x10_2000 + 8, 0x20_0083),
        (0x10_3000, 0x40_0007),
        (0x10_3000 + 8, 0x8000_0000_0030_0001),
    ];
    for (gpa, value) in entries {
        host.put(gpa, &value.to_le_bytes());
    }
}

#[test]
fn pages_of_each_size_are_found() {
    let host = host();
    tables(&host);
    let gvas = ["0xffffffff80000123", "0xffffffff80201234", "0xffffffff40000000"];
    let ended = host.look(&[], &[&["translate", "0x100000"], &gvas[..]].concat());
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    assert_eq!(
        ended.stdout,
        "0xffffffff80000123  0x000000400123  4 KiB  rwx  kernel\n\
         0xffffffff80201234  0x000000201234  2 MiB  rwx  kernel\n\
         0xffffffff40000000  0x000040000000  1 GiB  rw-  kernel\n"
    );
    let ended = host.look(&[], &["translate", "--verbose", "0x100000", gvas[0]]);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(lines.len(), 5);
    assert_eq!(lines[0], "  PML4E 0x101003 at gpa 0x100ff8");

    let ended =
        host.look(&[], &["translate", "--json", "0x100000", "0xffffffff80001000", "0x1000"]);
    assert_eq!(ended.code, Some(3));
    let objects: Vec<Value> =
        ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&objects[0]["gpa"], &objects[0]["writable"]), (&"0x300000".into(), &false.into()));
    assert_eq!(objects[0]["entries"].as_array().unwrap().len(), 4);
    assert_eq!(objects[0]["gva"], "0xffffffff80001000");
    assert_eq!(objects[0]["entries"][3]["value"], "0x8000000000300001");
    assert!(
        objects[1]["gpa"].is_null()
            && objects[1]["error"].as_str().unwrap().contains("not present")
    );
}

/// Five levels: a 4 KiB page, one as Linux marks PROT_NONE, one in transition as Windows writes it,
/// a 2 MiB page with PAT, a table where there is no memory, a 1 GiB page, and one in the upper
/// half.
fn five_levels(host: &Host) {
    let entries = [
        (0x20_0000, 0x20_1007_u64),
        (0x20_1000, 0x20_2007),
        (0x20_2000, 0x87),
        (0x20_2010, 0x20_3007),
        (0x20_3010, 0x20_4007),
        (0x20_3018, 0x40_1087),
        (0x20_3020, 0xd000_0007),
        (0x20_4000, 0x30_0007),
        (0x20_4008, !0x30_1000 & 0x000f_ffff_ffff_f000 | 0x104),
        (0x20_4010, 0x30_2880),
        (0x20_0000 + 0x111 * 8, 0x20_5003),
        (0x20_5000, 0x20_6003),
        (0x20_6000, 0x83),
    ];
    for (gpa, value) in entries {
        host.put(gpa, &value.to_le_bytes());
    }
}

#[test]
fn the_depth_of_the_tables_is_found_out() {
    let host = host();
    five_levels(&host);
    let gvas = ["0x1234", "0x80400000", "0x80600000", "0xff11000000000000"];
    let ended = host.look(&[], &[&["translate", "0x200000"], &gvas[..]].concat());
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{}", ended.stdout);
    assert_eq!(
        ended.stdout,
        "0x0000000000001234  0x000000001234  1 GiB  rwx  user\n\
         0x0000000080400000  0x000000300000  4 KiB  rwx  user\n\
         0x0000000080600000  0x000000400000  2 MiB  rwx  user\n\
         0xff11000000000000  0x000000000000  1 GiB  rwx  kernel\n"
    );
    let explicit =
        host.look(&[], &[&["translate", "--levels", "5", "0x200000"], &gvas[..]].concat());
    assert_eq!((explicit.stdout, explicit.stderr), (ended.stdout, String::new()));
    // The option is followed, with a warning.
    let ended = host.look(&[], &["translate", "--json", "--levels", "4", "0x200000", "0x1234"]);
    let object: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&object["levels"], &object["page_size"]), (&4.into(), &(2 << 20).into()));
    assert!(ended.stderr.contains("look as if they had 5 levels"), "{}", ended.stderr);
    // The table below is one of four levels.
    let ended = host.look(&[], &["translate", "--json", "0x201000", "0x1234"]);
    let object: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&object["levels"], &object["page_size"]), (&4.into(), &(1 << 30).into()));
    host.put(0x30_0000, b"FIVE-LEVEL-PAGE");
    let read = ["read", "--raw", "--gva", "--cr3", "0x200000", "0x80400000", "15"];
    assert_eq!(host.look(&[], &read).stdout, "FIVE-LEVEL-PAGE");
    // Tables that map nothing show nothing.
    let ended = host.look(&[], &["translate", "0x600000", "0x1234"]);
    assert_eq!(ended.code, Some(3));
    assert!(ended.stdout.contains("try --levels 5"), "{}", ended.stdout);
    let ended = host.look(&[], &["read", "--gva", "--cr3", "0x600000", "0x1234", "1"]);
    assert!(ended.code == Some(1) && ended.stderr.contains("try --levels 5"), "{}", ended.stderr);
    let ended = host.look(&[], &["translate", "--json", "0x600000", "0xff11000000000000"]);
    assert!(ended.stdout.contains("\"levels\":5"), "{}", ended.stdout);
}

#[test]
fn entries_that_are_not_present_say_what_they_mean() {
    let host = host();
    five_levels(&host);
    let gvas = ["0x80401008", "0x80402000", "0x80403000"];
    let ended = host.look(&[], &[&["translate", "0x200000"], &gvas[..]].concat());
    assert_eq!(ended.code, Some(3));
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert!(lines[0].contains("PROT_NONE") && lines[0].ends_with("gpa 0x301008"), "{}", lines[0]);
    assert!(
        lines[1].contains("in transition") && lines[1].ends_with("gpa 0x302000"),
        "{}",
        lines[1]
    );
    assert!(lines[2].ends_with("is not present"), "{}", lines[2]);
    let ended = host.look(&[], &[&["translate", "--json", "0x200000"], &gvas[..]].concat());
    let objects: Vec<Value> =
        ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        objects[0]["absent"],
        serde_json::json!({ "meaning": "prot_none", "gpa": "0x301008" })
    );
    assert_eq!(
        objects[1]["absent"],
        serde_json::json!({ "meaning": "transition", "gpa": "0x302000" })
    );
    assert!(objects[2]["absent"].is_null());
}

#[test]
fn every_address_has_its_line() {
    let host = host();
    five_levels(&host);
    let ended =
        host.look(&[], &["translate", "0x200000", "0x80800000", "0x80400000", "0x200000000000000"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(3), ""));
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert!(
        lines[0].contains("gpa 0xd0000000") && lines[0].contains("not memory of the target"),
        "{}",
        lines[0]
    );
    assert!(lines[1].starts_with("0x0000000080400000  0x000000300000  4 KiB"), "{}", lines[1]);
    assert!(lines[2].contains("not canonical"), "{}", lines[2]);
}

#[test]
fn what_can_be_read_is_printed_before_the_end() {
    let host = host();
    five_levels(&host);
    host.put(0x30_0ff0, b"0123456789abcdef");
    host.put(0x7f_fff0, b"0123456789abcdef");
    let cases: [(&[&str], &str); 2] = [
        (&["--gva", "--cr3", "0x200000", "0x80400ff0"], "gva 0x80401000 is not mapped"),
        (&["0x7ffff0"], "gpa 0x800000"),
    ];
    for (place, reason) in cases {
        for (form, words) in [
            (&["--raw"][..], "0123456789abcdef"),
            (&[], "|0123456789abcdef|"),
            (&["--json"], "\"30313233343536373839616263646566\""),
        ] {
            for len in ["32", "128K"] {
                let ended = host.look(&[], &[&["read"], place, &[len], form].concat());
                assert_eq!(ended.code, Some(1), "{place:?} {form:?}");
                assert!(ended.stdout.contains(words), "{place:?} {form:?}: {}", ended.stdout);
                assert!(ended.stdout.len() < 200, "{}", ended.stdout);
                assert!(ended.stderr.contains("after 0x10 of"), "{}", ended.stderr);
                assert!(ended.stderr.contains(reason), "{place:?} {form:?}: {}", ended.stderr);
            }
        }
    }
    // A 1 GiB page, partly without memory.
    let ended = host.look(&[], &["read", "--raw", "--gva", "--cr3", "0x200000", "0x7fffff", "4K"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), "f"));
    assert!(ended.stderr.contains("gva 0x800000, which is gpa 0x800000"), "{}", ended.stderr);
}

#[test]
fn what_is_not_mapped_is_told_and_has_its_exit_code() {
    let host = host();
    tables(&host);
    let cases = [
        ("0xffffffff80002000", "PTE 0x0 at gpa 0x103010 is not present"),
        ("0x0000800000000000", "--levels 5"),
        // The recursive entry leads four times through the same table, at last as if it were a
        // page.
        ("0xffff804020100000", "0x000000100000"),
    ];
    for (gva, words) in cases {
        let ended = host.look(&[], &["translate", "0x100000", gva]);
        assert_eq!(
            ended.code,
            Some(if gva.contains("8040201") { 0 } else { 3 }),
            "{gva}: {}",
            ended.stderr
        );
        assert!(ended.stdout.contains(words), "{gva}: {}", ended.stdout);
    }
    // Tables outside of the target's memory, or of the grant.
    let ended = host.look(&["--range", "0..1M"], &["translate", "0x100000", "0x1000"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("PML4E") || ended.stderr.contains("level 4"), "{}", ended.stderr);
    let ended = host.look(&[], &["translate", "--levels", "3", "0x100000", "0x1000"]);
    assert_eq!(ended.code, Some(2));
}

#[test]
fn virtual_memory_is_read_across_pages() {
    let host = host();
    tables(&host);
    host.put(0x40_0ffc, b"half");
    host.put(0x30_0000, b"way");
    let read = ["read", "--gva", "--cr3", "0x100000", "0xffffffff80000ffc"];
    let ended = host.look(&[], &[&read[..], &["7", "--raw"]].concat());
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "halfway"), "{}", ended.stderr);
    let ended = host.look(&[], &[&read[..], &["7", "--json"]].concat());
    assert!(ended.stdout.starts_with("{\"gva\":"), "{}", ended.stdout);
    let ended = host.look(&[], &[&read[..], &["8K"]].concat());
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("gva 0xffffffff80002000 is not mapped"), "{}", ended.stderr);
    assert_eq!(host.look(&[], &["read", "--gva", "0", "1"]).code, Some(2));
}

#[test]
fn physical_memory_is_read_and_written_by_a_view() {
    let host = host();
    host.put(0x3f_fffe, b"view");
    let ended = host.look(&[], &["read", "0x3ffffe", "4", "--raw"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "view"), "{}", ended.stderr);
    assert_eq!(host.look(&["--rw"], &["write", "0x3fffff", "49"]).code, Some(0));
    assert_eq!(host.look(&[], &["read", "0x3ffffe", "4", "--raw"]).stdout, "vIew");
    let ended = host.look(&[], &["write", "0x3fffff", "49"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("read-only"), "{}", ended.stderr);
}

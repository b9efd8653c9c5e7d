// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `translate`, and `read --gva`.

use serde_json::Value;

use crate::common::Host;
use crate::host;

const CR3: u64 = 0x10_0000;

/// A 4 KiB page, a 2 MiB page and a 1 GiB page, all in the upper half, and the recursive entry that some kernels use.
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

    let ended = host.look(&[], &["translate", "--json", "0x100000", "0xffffffff80001000", "0x1000"]);
    assert_eq!(ended.code, Some(3));
    let objects: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&objects[0]["gpa"], &objects[0]["writable"]), (&"0x300000".into(), &false.into()));
    assert_eq!(objects[0]["entries"].as_array().unwrap().len(), 4);
    assert_eq!(objects[0]["gva"], "0xffffffff80001000");
    assert_eq!(objects[0]["entries"][3]["value"], "0x8000000000300001");
    assert!(objects[1]["gpa"].is_null() && objects[1]["error"].as_str().unwrap().contains("not present"));
}

#[test]
fn what_is_not_mapped_is_told_and_has_its_exit_code() {
    let host = host();
    tables(&host);
    let cases = [
        ("0xffffffff80002000", "PTE 0x0 at gpa 0x103010 is not present"),
        ("0x0000800000000000", "--levels 5"),
        // The recursive entry leads four times through the same table, at last as if it were a page.
        ("0xffff804020100000", "0x000000100000"),
    ];
    for (gva, words) in cases {
        let ended = host.look(&[], &["translate", "0x100000", gva]);
        assert_eq!(ended.code, Some(if gva.contains("8040201") { 0 } else { 3 }), "{gva}: {}", ended.stderr);
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

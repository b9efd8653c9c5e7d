// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A dump as a new file: what is in it and beside it.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use kvmmem_client::vmm::Region;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{dump, hex, part, path};
use crate::common::{Host, UUID};
use crate::host;

#[test]
fn a_raw_dump_has_each_byte_at_its_address_and_keeps_the_holes() {
    let host = host();
    for place in [0, (4 << 20) - 2, (16 << 20) + 0x5000, (20 << 20) - 4] {
        host.put(place, b"data");
    }
    let before = host.allocated();
    let ended = dump(&host, &[], &["--json"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let summary: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&summary["bytes"], &summary["resumed"]), (&(20 << 20).into(), &false.into()));
    assert_eq!(host.allocated(), before, "the dump inflates the target");

    let file = fs::read(path(&host)).unwrap();
    let mut wanted = vec![0; 20 << 20];
    for place in [0, (4 << 20) - 2, (16 << 20) + 0x5000, (20 << 20) - 4] {
        wanted[place..place + 4].copy_from_slice(b"data");
    }
    assert!(file == wanted);
    let metadata = fs::metadata(path(&host)).unwrap();
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
    assert_eq!(metadata.mode() & 0o777, 0o600);
    assert!(!part(&host).exists());
}

#[test]
fn nothing_is_written_over() {
    let host = host();
    fs::write(path(&host), "mine").unwrap();
    let cases: [(&[&str], &str); 3] = [
        (&[], "remove it"),
        (&["--resume"], "complete or no dump"),
        (&["--range", "0..1M"], "remove it"),
    ];
    for (arguments, words) in cases {
        let ended = dump(&host, &[], arguments);
        assert_eq!(ended.code, Some(1));
        assert!(ended.stderr.contains(words), "{}", ended.stderr);
    }
    assert_eq!(fs::read(path(&host)).unwrap(), b"mine");
    fs::remove_file(path(&host)).unwrap();
    // Where nothing is begun, nothing has to be resumed.
    assert_eq!(dump(&host, &[], &["--resume"]).code, Some(0));
    fs::remove_file(host.path("dump.json")).unwrap();
    for (arguments, code, word) in [
        (["--range", "1M..3M", "--range", "2M..4M"], 2, "overlap"),
        (["--range", "8M..9M", "--format", "raw"], 1, "0x800000"),
    ] {
        fs::remove_file(path(&host)).ok();
        let ended = dump(&host, &[], &arguments);
        assert!(ended.code == Some(code) && ended.stderr.contains(word), "{}", ended.stderr);
        assert!(!path(&host).exists());
    }
}

#[test]
fn a_record_lies_beside_the_file() {
    let host = host();
    host.put(0x1000, b"data");
    let ended = dump(&host, &[], &["--json"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let record: Value = serde_json::from_slice(&fs::read(host.path("dump.json")).unwrap()).unwrap();
    assert_eq!(record, serde_json::from_str::<Value>(&ended.stdout).unwrap());
    assert_eq!((&record["name"], &record["target"]), (&"victim".into(), &UUID.to_string().into()));
    let range = |gpa: u64, len: u64| json!({"gpa": format!("{gpa:#x}"), "len": len});
    assert_eq!(
        record["ranges"],
        json!([range(0, 4 << 20), range(4 << 20, 4 << 20), range(16 << 20, 4 << 20)])
    );
    assert_eq!(record["left_out"], json!([range(8 << 20, 8 << 20)]));
    assert_eq!((&record["unreadable"], &record["vmcoreinfo"]), (&json!([]), &Value::Null));
    assert!(
        record["instance"].as_u64() > Some(0)
            && record["started_ms"].as_u64() <= record["ended_ms"].as_u64()
    );
    let digest: String = hex(&Sha256::digest(fs::read(path(&host)).unwrap()));
    assert_eq!(record["sha256"], digest.as_str());

    fs::remove_file(path(&host)).unwrap();
    let ended = dump(&host, &[], &[]);
    assert!(ended.code == Some(1) && ended.stderr.contains("dump.json exists"), "{}", ended.stderr);
    let elsewhere = host.path("elsewhere");
    let ended = dump(
        &host,
        &[],
        &["--no-hash", "--record", elsewhere.to_str().unwrap(), "--format", "elf"],
    );
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let record: Value = serde_json::from_slice(&fs::read(elsewhere).unwrap()).unwrap();
    assert_eq!((&record["sha256"], &record["format"]), (&Value::Null, &"elf".into()));
}

#[test]
fn what_is_left_out_of_a_range_is_told() {
    let host = host();
    let ended = dump(&host, &[], &["--range", "7M..12M", "--json"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("0x800000..0xc00000 is left out"), "{}", ended.stderr);
    let record: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(record["left_out"], json!([{"gpa": "0x800000", "len": 4 << 20}]));
    // A range without an end has none that could be missing.
    for file in ["dump", "dump.json"] {
        fs::remove_file(host.path(file)).unwrap();
    }
    let ended = dump(&host, &[], &["--range", "16M.."]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[test]
fn memory_that_cannot_be_read_is_zeros_and_told() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 << 20).unwrap();
    for page in 0..2048u64 {
        file.write_all_at(&(page + 1).to_le_bytes().repeat(512), page * 0x1000).unwrap();
    }
    let host = Host::start_file(&[Region { gpa: 0, len: 8 << 20, offset: 0, file: 0 }], &file);
    let whole = 0x50_3000;
    file.set_len(whole).unwrap();
    for format in ["raw", "elf"] {
        let ended = dump(&host, &[], &["--format", format, "--json"]);
        assert_eq!(ended.code, Some(3), "{}", ended.stderr);
        let record: Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!(record["unreadable"], json!([{"gpa": "0x503000", "len": (8 << 20) - whole}]));
        assert_eq!(record["data_bytes"], whole);
        let dumped = fs::read(path(&host)).unwrap();
        let memory = &dumped[dumped.len() - (8 << 20)..];
        for (page, bytes) in (1u64..).zip(memory.chunks(0x1000)) {
            let expected = if page * 0x1000 <= whole {
                page.to_le_bytes().repeat(512)
            } else {
                vec![0; 0x1000]
            };
            assert!(bytes == expected, "page {page:#x}");
        }
        assert!(host.path("dump.json").exists() && !part(&host).exists());
        for file in ["dump", "dump.json"] {
            fs::remove_file(host.path(file)).unwrap();
        }
    }
    let ended = dump(&host, &[], &[]);
    assert_eq!(ended.code, Some(3));
    assert!(ended.stdout.contains("0x503000..0x800000"), "{}", ended.stdout);
}

#[test]
fn a_process_is_dumped_of_a_linux_target_alone() {
    let host = host();
    for option in [["--format", "elf"], ["--range", "0..1M"]] {
        assert_eq!(dump(&host, &[], &[&["--pid", "1"], &option[..]].concat()).code, Some(2));
    }
    assert_eq!(dump(&host, &[], &["--pid", "1", "--resume"]).code, Some(2));
    let ended = dump(&host, &[], &["--pid", "1"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("no Linux kernel was found"), "{}", ended.stderr);
    assert!(!path(&host).exists() && !host.path("dump.json").exists());
}

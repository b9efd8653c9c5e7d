// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Each difference between the rows and the guest is found.

use anyhow::Result;
use serde_json::{Value, json};

use super::*;
use crate::linux::truth::Truth;

/// What a guest with 31 processes of the user's, two modules and two records shows.
fn truth() -> Truth {
    let mut sections = vec![
        (
            "/proc/modules".to_owned(),
            "dummy 16384 0 - Live 0xffffffffc0232000\nring 8 1 dummy, Live 0xff\n".to_owned(),
        ),
        (
            "/dev/kmsg".to_owned(),
            "6,1,1500,-;virtio\n SUBSYSTEM=virtio\n DEVICE=+virtio:0\n11,2,1700,-;two\\x0alines\n"
                .to_owned(),
        ),
    ];
    for pid in 10..41 {
        let mut file =
            |name: &str, text: String| sections.push((format!("/proc/{pid}/{name}"), text));
        let fields = "0 0 0 0 0 0 0 0 0 0 0 0";
        file("stat", format!("{pid} (a) b) S 1 0 0 0 -1 64 {fields} {} 0 0\n", 6400 + pid));
        file("status", "Name:\ta\nUid:\t1000\t1001\t0\t0\n".to_owned());
        file("comm", "a) b\n".to_owned());
        file("cmdline", "a\0\0b c\0".to_owned());
        file(&format!("task/{pid}/comm"), "a) b\n".to_owned());
        file("environ", "A=1\0\0B=\0".to_owned());
        sections.push((format!("->/proc/{pid}/fd/3"), "/tmp/a (deleted)".to_owned()));
        sections.push((format!("->/proc/{pid}/exe"), "/bin/a (deleted)".to_owned()));
        sections.push((format!("->/proc/{pid}/ns/net"), "net:[4026531833]".to_owned()));
    }
    let text = |(path, text): (String, String)| format!("@{path} {}\n{text}\n", text.len());
    let text: String = sections.into_iter().map(text).collect();
    Truth::parse(format!("{text}@end 0\n\n").as_bytes()).unwrap()
}

fn rows() -> Vec<Value> {
    let row = |pid: u64| {
        json!({"pid": pid, "tid": pid, "ppid": 1, "uid": 1000, "euid": 1001, "state": "S", "start_ms": (6400 + pid) * 10 + 3,
            "comm": "a) b", "args": ["a", "", "b c"], "kernel": false, "torn": false, "exe": "/bin/a", "exe_deleted": true,
            "namespaces": {"net": 4_026_531_833_u64, "user": null}, "env": ["A=1", "", "B="]})
    };
    (10..41).map(row).collect()
}

/// Each row that differs in one value is an error, as is one that is missing or too much.
fn each_difference_is_an_error(
    rows: &[Value],
    keys: &[&str],
    compare: impl Fn(&[Value]) -> Result<()>,
) {
    compare(rows).unwrap();
    for key in keys {
        let mut wrong = rows.to_vec();
        let value = &mut wrong[1][*key];
        *value = match &*value {
            Value::Number(number) => json!(number.as_u64().unwrap() + 1000),
            Value::String(text) => json!(format!("{text}x")),
            Value::Bool(is_so) => json!(!*is_so),
            _ => json!(["x"]),
        };
        assert!(compare(&wrong).is_err(), "{key}");
    }
    assert!(compare(&rows[..rows.len() - 1]).is_err());
}

#[test]
fn processes_that_differ_are_found() {
    let mut rows = rows();
    let truth = truth();
    let keys = [
        "pid",
        "ppid",
        "uid",
        "euid",
        "state",
        "start_ms",
        "comm",
        "args",
        "kernel",
        "torn",
        "exe",
        "exe_deleted",
        "namespaces",
    ];
    each_difference_is_an_error(&rows, &keys, |rows| processes(&truth, rows));
    each_difference_is_an_error(&rows, &["env", "exe"], |rows| environments(&truth, rows));
    each_difference_is_an_error(&rows, &["pid", "tid", "comm", "kernel"], |rows| {
        threads(&truth, rows)
    });
    rows.push(json!({"pid": 99, "comm": "hidden"}));
    assert!(processes(&truth, &rows).is_err());
    rows.last_mut().unwrap()["comm"] = json!("kworker/0:3");
    processes(&truth, &rows).unwrap();
}

#[test]
fn modules_and_records_that_differ_are_found() {
    let truth = truth();
    let module = |name: &str, size: u64, references: u64, users: &[&str], base: &str| json!({"name": name, "size": size, "references": references, "used_by": users, "state": "live", "base": base});
    let rows = [
        module("dummy", 16384, 0, &[], "0xffffffffc0232000"),
        module("ring", 8, 1, &["dummy"], "0xff"),
    ];
    let keys = ["name", "size", "references", "used_by", "state", "base"];
    each_difference_is_an_error(&rows, &keys, |rows| modules(&truth, rows));
    let record = |seq: u64,
                  facility: u64,
                  level: u64,
                  time: u64,
                  text: &str,
                  subsystem: &str,
                  device: &str| {
        json!({"seq": seq, "facility": facility, "level": level, "time_us": time, "text": text,
            "subsystem": subsystem, "device": device})
    };
    let rows = [
        record(1, 0, 6, 1500, "virtio", "virtio", "+virtio:0"),
        record(2, 1, 3, 1700, "two\nlines", "", ""),
    ];
    let keys = ["seq", "facility", "level", "time_us", "text", "subsystem", "device"];
    each_difference_is_an_error(&rows, &keys, |rows| log(&truth, rows));
}

#[test]
fn files_that_differ_are_found() {
    let row = |pid: u64| json!({"pid": pid, "fd": 3, "path": "/tmp/a", "deleted": true});
    let rows: Vec<_> = (10..41).map(row).collect();
    let truth = truth();
    each_difference_is_an_error(&rows, &["pid", "fd", "path", "deleted"], |rows| {
        files(&truth, rows)
    });
}

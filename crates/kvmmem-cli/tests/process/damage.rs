// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Processes and mappings that cannot be read whole.

use std::process::Command;

use serde_json::{Value, json};

use crate::builder::Guest;
use crate::common::{Ended, finish};
use crate::guest::{PID, guest, memory, number_of_another, second_area, target};

const LEN: u64 = 1 << 20;

/// The core of the process in a dump of the guest, and what is said about it.
fn core(guest: &Guest) -> (Ended, Value) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("ram"), memory(guest, LEN)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
    command.args(["dump", &path("core"), "--pid", PID, "--file", &path("ram"), "--json"]);
    command.env_remove("RUST_LOG");
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let ended = finish(command.spawn().unwrap());
    let record = serde_json::from_str(&ended.stdout).unwrap_or_default();
    assert!(folder.path().join("core.json").exists(), "{}", ended.stderr);
    (ended, record)
}

#[test]
fn the_record_of_a_core_has_what_is_missing_and_the_exit_code_tells() {
    let cases: [(u64, &[u8], i32, bool, u64); 3] = [
        (0, &[], 0, false, 0),
        // An area that leads nowhere; a process without a number.
        (second_area(), &[0xff; 6], 3, true, 0),
        (number_of_another(), &[0; 4], 3, false, 1),
    ];
    for (at, bytes, code, damaged, lost) in cases {
        let guest = guest(LEN);
        guest.put(at, bytes);
        let (ended, record) = core(&guest);
        assert_eq!(ended.code, Some(code), "{at:#x}: {}", ended.stderr);
        assert_eq!(
            (&record["damaged"], &record["lost_threads"]),
            (&json!(damaged), &json!(lost)),
            "{record}"
        );
        assert_eq!(ended.stderr.is_empty(), code == 0, "{}", ended.stderr);
    }
}

#[test]
fn ps_ends_alike_with_and_without_watching() {
    let guest = guest(LEN);
    let whole = target(&memory(&guest, LEN));
    guest.put(number_of_another(), &[0; 4]);
    let damaged = target(&memory(&guest, LEN));
    let watch = ["ps", "--target", "victim", "--watch", "--interval", "1ms", "--count"];
    for (host, code) in [(&whole, 0), (&damaged, 3)] {
        let plain = host.run(&["ps", "--target", "victim"]);
        assert_eq!(plain.code, Some(code), "{}", plain.stderr);
        for count in ["1", "3"] {
            let watched = host.run(&[&watch[..], &[count]].concat());
            assert_eq!(watched.code, Some(code), "{}", watched.stderr);
            assert_eq!(watched.stderr.lines().last(), plain.stderr.lines().last());
            let warnings = watched.stderr.matches("warning: some of the list").count();
            assert_eq!(warnings, usize::from(code != 0), "{}", watched.stderr);
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares output about a guest as a whole: its row among the machines of this host, what starts
//! and ends in it, and the findings of `check`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::processes::{WORKER, line, process_ids};
use super::row::{number, text};
use crate::linux::truth::Truth;

/// `check` of a guest that is as it should be.
pub(in crate::linux) fn untouched(truth: &Truth, rows: &[Value]) -> Result<()> {
    let modules = truth.text("/proc/modules")?.lines().count();
    let kernel = truth.text("/proc/sys/kernel/osrelease")?;
    let mut checks = BTreeMap::new();
    for row in rows {
        ensure!(row["found"] == 0, "{row} is no sound check");
        checks.insert(text(row, "check")?, row["examined"].as_u64());
    }
    let examined =
        |check: &str| checks.get(check).copied().flatten().with_context(|| format!("no {check}"));
    ensure!(
        examined("system-calls")? > 400,
        "there are {} system calls",
        examined("system-calls")?
    );
    ensure!(examined("interrupts")? == 256, "there are {} interrupts", examined("interrupts")?);
    ensure!(examined("modules")? == modules as u64, "there should be {modules} modules");
    let tasks = process_ids(truth).count() as u64;
    ensure!(examined("tasks")? >= tasks, "there should be {tasks} tasks");
    // Debian's 5.10 has none.
    let has_dispatcher = !kernel.starts_with("5.");
    ensure!(
        has_dispatcher == examined("dispatcher").is_ok_and(|count| count > 300),
        "the dispatcher of {kernel}"
    );
    Ok(())
}

/// `ps --watch` of a guest that keeps still.
pub(in crate::linux) fn changes(rows: &[Value]) -> Result<()> {
    for row in rows {
        ensure!(["started", "ended"].contains(&text(row, "event")?), "{row} is no change");
        ensure!(text(row, "comm")?.starts_with(WORKER), "the guest keeps still, but for {row}");
    }
    Ok(())
}

/// `info --all`: the row of one guest.
pub(in crate::linux) fn machine(truth: &Truth, name: &str, rows: &[Value]) -> Result<()> {
    let row = rows
        .iter()
        .find(|row| row["name"] == name)
        .with_context(|| format!("{name} has no row"))?;
    let release = line(truth.bytes("/proc/sys/kernel/osrelease")?);
    ensure!(text(row, "release")? == release, "{row} should have release {release}");
    let host_name = line(truth.bytes("/proc/sys/kernel/hostname")?);
    ensure!(text(row, "host_name")? == host_name, "{row} should have host name {host_name}");
    ensure!(
        number(row, "pid")? > 1 && number(row, "uptime_ms")? > 0,
        "{row} has no pid or no uptime"
    );
    // Those of work queues come and go.
    let processes =
        process_ids(truth).count().abs_diff(usize::try_from(number(row, "processes")?)?);
    ensure!(processes < 10, "{row} is off by {processes} processes");
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_check_that_finds_something_or_too_little_is_an_error() {
        let mut text =
            "@/proc/modules 8\na 1\nb 2\n\n@/proc/sys/kernel/osrelease 3\n6.1\n".to_owned();
        (1..31).for_each(|pid| text.push_str(&format!("@/proc/{pid}/stat 1\n1\n")));
        let truth = Truth::parse(format!("{text}@end 0\n\n").as_bytes()).unwrap();
        let counts = [
            ("system-calls", 401),
            ("dispatcher", 301),
            ("interrupts", 256),
            ("modules", 2),
            ("tasks", 30),
        ];
        let rows = counts
            .map(|(check, examined)| json!({"check": check, "examined": examined, "found": 0}));
        untouched(&truth, &rows).unwrap();
        for number in 0..rows.len() {
            for (key, value) in [("found", 1), ("examined", 1)] {
                let mut wrong = rows.clone();
                wrong[number][key] = json!(value);
                assert!(untouched(&truth, &wrong).is_err(), "{key} of {number}");
            }
            let missing = [&rows[..number], &rows[number + 1..]].concat();
            assert!(untouched(&truth, &missing).is_err(), "{number}");
        }
    }

    #[test]
    fn machines_and_changes_that_differ_are_found() {
        let mut text = String::new();
        for (name, value) in [("osrelease", "6.1\n"), ("hostname", "scene-1\n")] {
            text.push_str(&format!("@/proc/sys/kernel/{name} {}\n{value}\n", value.len()));
        }
        (1..31).for_each(|pid| text.push_str(&format!("@/proc/{pid}/stat 1\n1\n")));
        let truth = Truth::parse(format!("{text}@end 0\n\n").as_bytes()).unwrap();
        let row = json!({"name": "a", "pid": 7, "release": "6.1", "host_name": "scene-1", "uptime_ms": 5, "processes": 31});
        machine(&truth, "a", std::slice::from_ref(&row)).unwrap();
        for (key, value) in [
            ("name", json!("b")),
            ("pid", json!(0)),
            ("release", json!("6.12")),
            ("host_name", json!("scene-2")),
            ("uptime_ms", json!(0)),
            ("processes", json!(60)),
        ] {
            let mut wrong = row.clone();
            wrong[key] = value;
            assert!(machine(&truth, "a", &[wrong]).is_err(), "{key}");
        }
        changes(&[json!({"event": "started", "comm": "kworker/0:3"})]).unwrap();
        assert!(changes(&[json!({"event": "started", "comm": "sh"})]).is_err());
        assert!(changes(&[json!({"event": "left", "comm": "kworker/0:3"})]).is_err());
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel, its modules and its log.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::row::{number, text};
use crate::linux::truth::Truth;

/// Records that the kernel may log after the guest has read its log, and so may overwrite others.
const MORE_RECORDS: u64 = 100;

/// `dmesg`.
pub(in crate::linux) fn log(truth: &Truth, rows: &[Value]) -> Result<()> {
    let mut found = BTreeMap::new();
    for row in rows {
        found.insert(number(row, "seq")?, row);
    }
    let records = kernel_log(truth)?;
    let (oldest, first) = (records.keys().next(), found.keys().next());
    let (oldest, first) =
        (*oldest.context("the guest has no log")?, *first.context("no record was found")?);
    ensure!(
        (oldest..oldest + MORE_RECORDS).contains(&first),
        "its first record is {first}, and should be {oldest}"
    );
    for (seq, expected) in records.range(first..) {
        let row =
            found.get(seq).with_context(|| format!("record {seq} is missing: {expected:?}"))?;
        let record = Record {
            priority: number(row, "facility")? << 3 | number(row, "level")?,
            time: number(row, "time_us")?,
            text: text(row, "text")?.to_owned(),
            subsystem: text(row, "subsystem")?.to_owned(),
            device: text(row, "device")?.to_owned(),
        };
        ensure!(record == *expected, "record {seq} is {record:?}, and should be {expected:?}");
    }
    Ok(())
}

/// `modules`.
pub(in crate::linux) fn modules(truth: &Truth, rows: &[Value]) -> Result<()> {
    let expected = truth.text("/proc/modules")?;
    let found = rows.iter().map(|row| {
        let users = row["used_by"].as_array().context("it has no used_by")?;
        let users: String =
            users.iter().filter_map(Value::as_str).map(|user| format!("{user},")).collect();
        let users = if users.is_empty() { "-" } else { &users };
        let state = match text(row, "state")? {
            "live" => "Live",
            "loading" => "Loading",
            "unloading" => "Unloading",
            other => bail!("there is no state {other:?}"),
        };
        let (name, size, references) =
            (text(row, "name")?, number(row, "size")?, number(row, "references")?);
        Ok(format!("{name} {size} {references} {users} {state} {}\n", text(row, "base")?))
    });
    let found: String = found.collect::<Result<_>>()?;
    ensure!(found == expected, "the modules are\n{found}and should be\n{expected}");
    ensure!(found.contains("dummy "), "the guest has loaded no module");
    Ok(())
}

/// `info`.
pub(in crate::linux) fn kernel(truth: &Truth, rows: &[Value]) -> Result<()> {
    let [row] = rows else { bail!("there are {} rows", rows.len()) };
    for (key, path) in [
        ("release", "/proc/sys/kernel/osrelease"),
        ("version", "/proc/sys/kernel/version"),
        ("host_name", "/proc/sys/kernel/hostname"),
        ("command_line", "/proc/cmdline"),
    ] {
        let (found, expected) = (text(row, key)?, truth.text(path)?);
        ensure!(found == expected.trim(), "its {key} is {found:?}, and should be {expected:?}");
    }
    let stat = truth.text("/proc/stat")?;
    let booted = stat.lines().find_map(|line| line.strip_prefix("btime ")).context("no btime")?;
    ensure!(number(row, "booted")? == booted.parse::<u64>()?, "it was booted at {booted}: {row}");
    let uptime: f64 =
        truth.text("/proc/uptime")?.split(' ').next().context("no uptime")?.parse()?;
    let found = row["uptime_ms"].as_f64().context("no uptime_ms")? / 1000.0;
    // The kernel looks at its clock when it has something to do.
    ensure!(found > uptime - 5.0, "it has run for {found} s, and had for {uptime} s before");
    let start =
        u64::from_str_radix(truth.text("_text")?.split(' ').next().unwrap_or_default(), 16)?;
    let offset = format!("{:#x}", start.wrapping_sub(0xffff_ffff_8100_0000));
    ensure!(text(row, "kaslr_offset")? == offset, "it was moved by {offset}: {row}");
    let notes = truth.bytes("/sys/kernel/notes")?;
    let id = text(row, "build_id")?;
    let hex: String = notes.iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(id.len() == 40 && hex.contains(id), "no note of the guest has build id {id}");
    Ok(())
}

/// A record of the log.
#[derive(Debug, PartialEq)]
struct Record {
    priority: u64,
    time: u64,
    text: String,
    subsystem: String,
    device: String,
}

/// What /dev/kmsg gave: `PRIORITY,SEQ,MICROSECONDS,FLAGS;TEXT`, and lines ` KEY=VALUE`.
fn kernel_log(truth: &Truth) -> Result<BTreeMap<u64, Record>> {
    let mut records = BTreeMap::new();
    let mut last = None;
    for line in truth.text("/dev/kmsg")?.lines() {
        if let Some(entry) = line.strip_prefix(' ') {
            let record = last.and_then(|seq| records.get_mut(&seq));
            let record: &mut Record =
                record.context("the log begins with an entry of no record")?;
            match entry.split_once('=') {
                Some(("SUBSYSTEM", value)) => record.subsystem = unescape(value),
                Some(("DEVICE", value)) => record.device = unescape(value),
                _ => {}
            }
            continue;
        }
        let (fields, text) =
            line.split_once(';').with_context(|| format!("{line:?} is no record"))?;
        let mut fields = fields.split(',');
        let mut number =
            || Ok::<u64, anyhow::Error>(fields.next().context("a field is missing")?.parse()?);
        let (priority, seq, time) = (number()?, number()?, number()?);
        let (subsystem, device) = Default::default();
        records.insert(seq, Record { priority, time, text: unescape(text), subsystem, device });
        last = Some(seq);
    }
    Ok(records)
}

/// Turns `\xHH` into bytes; what is not UTF-8 then is replaced.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut parts = text.split("\\x");
    bytes.extend_from_slice(parts.next().unwrap_or_default().as_bytes());
    for part in parts {
        let (digits, rest) = part.split_at_checked(2).unwrap_or((part, ""));
        bytes.extend(u8::from_str_radix(digits, 16).ok());
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

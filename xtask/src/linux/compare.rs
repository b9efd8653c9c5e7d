// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares the rows of a verb with what the guest's own /proc shows.
//!
//! The guest keeps still, but its kernel does not quite: workers of its queues come, go and are
//! renamed, and its threads wake up. What can change in that way is not compared.

mod machine;
mod sockets;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::truth::Truth;
pub(super) use machine::{changes, machine, untouched};
pub(super) use sockets::sockets;

/// /proc counts times in hundredths of a second.
const TICK_MS: u64 = 10;

/// Records that the kernel may log after the guest has read its log, and so may overwrite others.
const MORE_RECORDS: u64 = 100;

/// The longest pattern that `scan` takes, which is more than fits in a page with what is before it.
const PATTERN: usize = 4096;

/// What a worker of a queue is called.
const WORKER: &str = "kworker/";

/// A process as /proc shows it.
#[derive(Debug)]
struct Process {
    comm: String,
    state: String,
    ppid: u64,
    start: u64,
    uids: Vec<u64>,
    args: Vec<String>,
    is_kernel: bool,
    exe: Option<String>,
    /// Inode numbers; of a process that ends, most are `None`.
    namespaces: [(&'static str, Option<u64>); 8],
}

/// `ps`.
pub(super) fn processes(truth: &Truth, rows: &[Value]) -> Result<()> {
    let mut found = BTreeMap::new();
    for row in rows {
        let pid = number(row, "pid")?;
        ensure!(found.insert(pid, row).is_none(), "process {pid} is there twice");
    }
    let expected = process_ids(truth)
        .map(|pid| Ok((pid, process(truth, pid)?)))
        .collect::<Result<BTreeMap<_, _>>>()?;
    ensure!(expected.len() > 30, "the guest shows {} processes only", expected.len());
    for (pid, process) in &expected {
        let is_worker = process.comm.starts_with(WORKER);
        match found.remove(pid) {
            Some(row) => {
                same_process(*pid, process, row).with_context(|| format!("process {pid}: {row}"))?
            }
            None if is_worker => {}
            None => bail!("process {pid} is missing: {process:?}"),
        }
    }
    match found.values().find(|row| !text(row, "comm").is_ok_and(|comm| comm.starts_with(WORKER))) {
        Some(row) => bail!("the guest has no such process: {row}"),
        None => Ok(()),
    }
}

fn same_process(pid: u64, process: &Process, row: &Value) -> Result<()> {
    let comm = text(row, "comm")?;
    let state = text(row, "state")?;
    if process.comm.starts_with(WORKER) {
        ensure!(comm.starts_with(WORKER), "its name should be {:?}", process.comm);
    } else if process.is_kernel {
        // Older kernels cut it off.
        ensure!(comm.starts_with(&process.comm), "its name should be {:?}", process.comm);
    } else {
        ensure!(comm == process.comm, "its name should be {:?}", process.comm);
        // The first one wrote the truth, and then rests.
        ensure!(state == process.state || pid == 1, "its state should be {}", process.state);
    }
    ensure!("RSDTtXZPI".contains(state), "there is no state {state:?}");
    ensure!(number(row, "ppid")? == process.ppid, "its parent should be {}", process.ppid);
    ensure!(
        number(row, "start_ms")? / TICK_MS == process.start,
        "its start should be {}",
        process.start
    );
    let uids = [number(row, "uid")?, number(row, "euid")?];
    ensure!(process.uids.starts_with(&uids), "its users should be {:?}", process.uids);
    ensure!(row["kernel"] == process.is_kernel, "is it the kernel's own?");
    ensure!(row["torn"] == false, "it is torn");
    let args = row["args"].as_array().context("it has no args")?;
    let args: Vec<_> = args.iter().filter_map(Value::as_str).collect();
    ensure!(args == process.args, "its command line should be {:?}", process.args);
    let deleted = if row["exe_deleted"] == true { " (deleted)" } else { "" };
    let exe = row["exe"].as_str().map(|exe| exe.to_owned() + deleted);
    ensure!(exe == process.exe, "its program should be {:?}", process.exe);
    for (kind, expected) in &process.namespaces {
        ensure!(
            row["namespaces"][kind].as_u64() == *expected,
            "its namespace {kind} should be {expected:?}"
        );
    }
    Ok(())
}

/// `ps --env`: the environments of all processes.
pub(super) fn environments(truth: &Truth, rows: &[Value]) -> Result<()> {
    let mut count = 0;
    for row in rows {
        let pid = number(row, "pid")?;
        let Ok(expected) = truth.bytes(&format!("/proc/{pid}/environ")) else { continue };
        let expected = words(expected);
        let found = row["env"].as_array().context("it has no env")?;
        let found: Vec<_> = found.iter().filter_map(Value::as_str).collect();
        ensure!(
            found == expected,
            "the environment of process {pid} is {found:?}, and should be {expected:?}"
        );
        count += usize::from(!found.is_empty());
    }
    ensure!(count > 10, "the guest shows {count} environments only");
    processes(truth, rows)
}

/// `ps --threads`: the threads of all processes but the kernel's, which has one in each.
pub(super) fn threads(truth: &Truth, rows: &[Value]) -> Result<()> {
    let mut expected = BTreeMap::new();
    for pid in process_ids(truth) {
        if process(truth, pid)?.is_kernel {
            continue;
        }
        let prefix = format!("/proc/{pid}/task/");
        for (path, comm) in truth.below(&prefix) {
            let tid = path.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix("/comm"));
            if let Some(tid) = tid {
                expected.insert((pid, tid.parse()?), line(comm));
            }
        }
    }
    ensure!(expected.len() > 10, "the guest shows {} threads only", expected.len());
    let rows = rows.iter().filter(|row| row["kernel"] == false);
    let found = rows
        .map(|row| Ok(((number(row, "pid")?, number(row, "tid")?), text(row, "comm")?.to_owned())));
    let found = found.collect::<Result<BTreeMap<_, _>>>()?;
    ensure!(found == expected, "the threads are {found:?}, and should be {expected:?}");
    Ok(())
}

/// A process whose command line is longer than a page, and as much of it as a pattern may have.
pub(super) fn long_command_line(truth: &Truth) -> Result<(String, &[u8])> {
    let mut lines = truth.below("/proc/").filter_map(|(path, line)| {
        let pid = path.strip_prefix("/proc/")?.strip_suffix("/cmdline")?;
        Some((pid.to_owned(), line.get(..PATTERN)?))
    });
    lines.next().context("no process of the guest has a long command line")
}

/// `files`: those of all processes but the first one, which was writing the truth.
pub(super) fn files(truth: &Truth, rows: &[Value]) -> Result<()> {
    let mut expected = BTreeMap::new();
    for (path, target) in truth.below("->/proc/") {
        let place = path.strip_prefix("->/proc/").and_then(|path| path.split_once("/fd/"));
        if let Some((pid, fd)) = place.filter(|(pid, _)| *pid != "1") {
            expected
                .insert((pid.parse()?, fd.parse()?), String::from_utf8_lossy(target).into_owned());
        }
    }
    ensure!(expected.len() > 20, "the guest shows {} open files only", expected.len());
    let mut found = BTreeMap::new();
    for row in rows.iter().filter(|row| row["pid"] != 1) {
        let deleted = if row["deleted"] == true { " (deleted)" } else { "" };
        let place = (number(row, "pid")?, number(row, "fd")?);
        ensure!(
            found.insert(place, text(row, "path")?.to_owned() + deleted).is_none(),
            "{row} is there twice"
        );
    }
    ensure!(found == expected, "the files are {found:?}, and should be {expected:?}");
    Ok(())
}

/// `dmesg`.
pub(super) fn log(truth: &Truth, rows: &[Value]) -> Result<()> {
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
pub(super) fn modules(truth: &Truth, rows: &[Value]) -> Result<()> {
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
pub(super) fn kernel(truth: &Truth, rows: &[Value]) -> Result<()> {
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

pub(super) fn process_ids(truth: &Truth) -> impl Iterator<Item = u64> {
    truth
        .below("/proc/")
        .filter_map(|(path, _)| path.strip_prefix("/proc/")?.strip_suffix("/stat")?.parse().ok())
}

fn process(truth: &Truth, pid: u64) -> Result<Process> {
    let file = |name: &str| truth.bytes(&format!("/proc/{pid}/{name}"));
    // The name may hold anything, also `)`.
    let stat = String::from_utf8_lossy(file("stat")?).into_owned();
    let (_, fields) = stat.rsplit_once(") ").context("no stat")?;
    let fields: Vec<_> = fields.split(' ').collect();
    let field =
        |number: usize| fields.get(number - 3).copied().context("a field of stat is missing");
    let status = String::from_utf8_lossy(file("status")?).into_owned();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).context("no Uid")?;
    let uids =
        uids.split_ascii_whitespace().map(|uid| Ok(uid.parse()?)).collect::<Result<Vec<_>>>()?;
    let link = |name: &str| truth.text(&format!("->/proc/{pid}/{name}")).ok();
    let namespace = |kind| (kind, link(&format!("ns/{kind}")).and_then(|link| inode(&link)));
    let flags: u64 = field(9)?.parse()?;
    Ok(Process {
        comm: line(file("comm")?),
        state: field(3)?.to_owned(),
        ppid: field(4)?.parse()?,
        start: field(22)?.parse()?,
        uids,
        args: words(file("cmdline")?),
        // PF_KTHREAD
        is_kernel: flags & 0x20_0000 != 0,
        exe: link("exe"),
        namespaces: ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"].map(namespace),
    })
}

/// The number in a link such as `net:[4026531833]`.
fn inode(link: &str) -> Option<u64> {
    link.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

/// Strings that end with a zero each.
fn words(bytes: &[u8]) -> Vec<String> {
    let words = bytes.strip_suffix(&[0]).unwrap_or(bytes).split(|byte| *byte == 0);
    let words = words.map(|word| String::from_utf8_lossy(word).into_owned());
    if bytes.is_empty() { Vec::new() } else { words.collect() }
}

/// Text without the line's end.
fn line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(b"\n").unwrap_or(bytes)).into_owned()
}

pub(super) fn number(row: &Value, key: &str) -> Result<u64> {
    row[key].as_u64().with_context(|| format!("no number {key} in {row}"))
}

pub(super) fn text<'a>(row: &'a Value, key: &str) -> Result<&'a str> {
    row[key].as_str().with_context(|| format!("no text {key} in {row}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Processes, their threads and their files.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::row::{number, text};
use crate::linux::truth::Truth;

/// /proc counts times in hundredths of a second.
const TICK_MS: u64 = 10;

/// The longest pattern that `scan` takes, which is more than fits in a page with what is before it.
const PATTERN: usize = 4096;

/// What a worker of a queue is called.
pub(super) const WORKER: &str = "kworker/";

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
pub(in crate::linux) fn processes(truth: &Truth, rows: &[Value]) -> Result<()> {
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
pub(in crate::linux) fn environments(truth: &Truth, rows: &[Value]) -> Result<()> {
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
pub(in crate::linux) fn threads(truth: &Truth, rows: &[Value]) -> Result<()> {
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
pub(in crate::linux) fn long_command_line(truth: &Truth) -> Result<(String, &[u8])> {
    let mut lines = truth.below("/proc/").filter_map(|(path, line)| {
        let pid = path.strip_prefix("/proc/")?.strip_suffix("/cmdline")?;
        Some((pid.to_owned(), line.get(..PATTERN)?))
    });
    lines.next().context("no process of the guest has a long command line")
}

/// `files`: those of all processes but the first one, which was writing the truth.
pub(in crate::linux) fn files(truth: &Truth, rows: &[Value]) -> Result<()> {
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

pub(in crate::linux) fn process_ids(truth: &Truth) -> impl Iterator<Item = u64> {
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
pub(super) fn line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(b"\n").unwrap_or(bytes)).into_owned()
}

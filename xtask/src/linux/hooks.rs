// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a rootkit does, in a dump: a system call leads into a module, a process and that module are
//! taken out of their lists.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use kvmmem_linux::tasks::{Tasks, Which};
use kvmmem_linux::{Find, Kernel};
use kvmmem_memory::DumpFile;
use serde_json::Value;

use super::compare::text;

/// The system call that is hooked: kill.
const CALL: u64 = 62;

/// The process and the module that are hidden. The process has threads, which go with it.
const PROCESS: &str = "threads";
const MODULE: &str = "dummy";

/// What `check` must find: in the order of its rows, the first value of each.
pub(super) fn write(dump: &Path) -> Result<Vec<String>> {
    let memory = DumpFile::open(dump)?;
    let kernel = Kernel::find(&memory, Find::default())?;
    let file = OpenOptions::new().write(true).open(dump)?;
    let put = |gva: u64, word: u64| {
        let gpa = kernel.space().translate(gva)?.gpa;
        let segments = memory.segments().iter();
        let segment =
            segments.rev().find(|segment| segment.range.gpa <= gpa).context("no segment")?;
        file.write_all_at(&word.to_le_bytes(), segment.offset + gpa - segment.range.gpa)?;
        Ok::<_, anyhow::Error>(())
    };
    let unlink = |node: u64| {
        let (next, previous) = (kernel.read_u64(node)?, kernel.read_u64(node + 8)?);
        put(previous, next).and_then(|()| put(next + 8, previous))
    };
    let task = Tasks::new(&kernel, Which::Processes)?
        .find(|task| task.as_ref().is_ok_and(|task| task.comm == PROCESS));
    let task = task.context("the process is not there")??;
    let threads = Tasks::new(&kernel, Which::Threads)?.filter_map(Result::ok);
    let threads = threads.filter(|thread| thread.pid == task.pid).count();
    let module = kvmmem_linux::modules::Modules::new(&kernel)?
        .find(|module| module.as_ref().is_ok_and(|module| module.name == MODULE));
    let module = module.context("the module is not there")??;
    put(kernel.symbol("sys_call_table")? + 8 * CALL, module.base + 0x10)?;
    unlink(task.gva + kernel.offset("task_struct", "tasks")?)?;
    unlink(module.gva + kernel.offset("module", "list")?)?;
    let mut expected = vec![format!("system call {CALL}"), format!("module {MODULE}")];
    expected.push(format!("process {} ({PROCESS})", task.pid));
    ensure!(threads > 1, "the process has {threads} threads");
    expected.resize(expected.len() + threads - 1, format!("of process {} (", task.pid));
    Ok(expected)
}

/// Compares the findings, in any order of the threads.
pub(super) fn compare(expected: &[String], rows: &[Value]) -> Result<()> {
    let mut found = Vec::new();
    for row in rows.iter().filter(|row| !row["finding"].is_null()) {
        let (key, place, expected) = match text(row, "finding")? {
            "hook" => ("entry", "place", format!("module {MODULE}")),
            _ => ("name", "missing_from", "list".to_owned()),
        };
        ensure!(text(row, place)?.contains(&expected), "{row} should have {place} {expected:?}");
        let name = text(row, key)?;
        found.push(name.to_owned());
    }
    let is_same = |(found, expected): (&String, &String)| found.contains(expected.as_str());
    found.sort_by_key(|name| expected.iter().position(|expected| name.contains(expected.as_str())));
    ensure!(
        found.len() == expected.len() && found.iter().zip(expected).all(is_same),
        "found were {found:?}, and should be {expected:?}: {rows:?}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn findings_that_differ_are_found() {
        let expected = ["system call 62", "module dummy"].map(str::to_owned);
        let rows = [
            json!({"check": "modules", "examined": 2, "found": 1}),
            json!({"finding": "hidden", "name": "module dummy", "missing_from": "the list of modules"}),
            json!({"finding": "hook", "entry": "system call 62", "place": "module dummy"}),
        ];
        compare(&expected, &rows).unwrap();
        assert!(compare(&expected, &rows[..2]).is_err());
        assert!(compare(&expected[..1], &rows).is_err());
        let mut wrong = rows.clone();
        wrong[2]["entry"] = json!("system call 63");
        assert!(compare(&expected, &wrong).is_err());
        let mut wrong = rows;
        wrong[2]["place"] = json!("module virtio_blk");
        assert!(compare(&expected, &wrong).is_err());
    }
}

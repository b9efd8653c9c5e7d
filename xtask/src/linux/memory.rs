// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of processes: their maps, and verbs that take guest-virtual addresses, compared with
//! what the guest shows and with what actor "memory" of the scene has written.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::compare::{number, process_ids, text};
use super::truth::Truth;

/// What `tests/linux/scene.c` has at places of its choice: text over two pages, and some in a page
/// without access.
const TEXT: (u64, &str) = (0x2000_0000_0ff6, "scene: text over two pages");
const HIDDEN: (u64, &str) = (0x3000_0000_0000, "scene: no access");

/// A page of the program's first function, which every process has run.
const CODE: u64 = 0x40_1000;

/// A verb with its options, and what looks at its rows.
pub(super) type Verb<'a> = (Vec<String>, Box<dyn Fn(&[Value]) -> Result<()> + 'a>);

/// Verbs about the memory of one process.
pub(super) fn verbs(truth: &Truth) -> Result<Vec<Verb<'_>>> {
    let is_actor =
        |pid: &u64| truth.text(&format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == "memory\n");
    let pid = process_ids(truth).find(is_actor).context("the guest has no process \"memory\"")?;
    let read = |place: (u64, &'static str)| -> Verb<'_> {
        let (address, length) = (format!("{:#x}", place.0), place.1.len().to_string());
        let words = ["read", "--pid", &pid.to_string(), &address, &length].map(str::to_owned);
        (words.to_vec(), Box::new(move |rows| has_bytes(rows, place)))
    };
    let translate =
        ["translate", "--pid", &pid.to_string(), &format!("{:#x}", TEXT.0), &format!("{CODE:#x}")];
    let watch =
        ["watch", "--pid", &pid.to_string(), "--count", "1", &format!("{:#x}", HIDDEN.0), "16"];
    Ok(vec![
        read(TEXT),
        read(HIDDEN),
        (translate.map(str::to_owned).to_vec(), Box::new(translated)),
        (watch.map(str::to_owned).to_vec(), Box::new(|rows| has_bytes(rows, HIDDEN))),
    ])
}

fn has_bytes(rows: &[Value], (gva, expected): (u64, &str)) -> Result<()> {
    let [row] = rows else { bail!("there are {} rows", rows.len()) };
    let hex: String = expected.bytes().map(|byte| format!("{byte:02x}")).collect();
    ensure!(
        text(row, "gva")? == format!("{gva:#x}") && text(row, "hex")? == hex,
        "it should be {hex}: {row}"
    );
    Ok(())
}

fn translated(rows: &[Value]) -> Result<()> {
    let [data, code] = rows else { bail!("there are {} rows", rows.len()) };
    for (row, gva, writable, executable) in [(data, TEXT.0, true, false), (code, CODE, false, true)]
    {
        ensure!(text(row, "gva")? == format!("{gva:#x}"), "it should be of {gva:#x}: {row}");
        let is_so =
            row["user"] == true && row["writable"] == writable && row["executable"] == executable;
        ensure!(
            is_so && row["gpa"].is_string(),
            "the process's memory has other permissions: {row}"
        );
    }
    Ok(())
}

/// `maps`: of all processes but the first one, which was writing the truth.
pub(super) fn maps(truth: &Truth, rows: &[Value]) -> Result<()> {
    let mut expected = BTreeMap::new();
    for pid in process_ids(truth).filter(|pid| *pid != 1) {
        let maps = truth.text(&format!("/proc/{pid}/maps"))?;
        let lines = maps.lines().map(expected_line).collect::<Result<Vec<_>>>()?;
        if !lines.is_empty() {
            expected.insert(pid, lines);
        }
    }
    let mut found: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for row in rows.iter().filter(|row| row["pid"] != 1) {
        ensure!(row["torn"] == false, "it is torn: {row}");
        found.entry(number(row, "pid")?).or_default().push(line(row)?);
    }
    let count = expected.values().map(Vec::len).sum::<usize>();
    ensure!(count > 1000 && expected.len() > 10, "the guest shows {count} mappings only");
    for (pid, lines) in &expected {
        let found = found.remove(pid).unwrap_or_default();
        let wrong = (0..lines.len().max(found.len())).find(|at| lines.get(*at) != found.get(*at));
        if let Some(at) = wrong {
            bail!(
                "mapping {at} of process {pid} is {:?}, and should be {:?}",
                found.get(at),
                lines.get(at)
            );
        }
    }
    ensure!(found.is_empty(), "the guest shows no mappings of {:?}", found.keys());
    Ok(())
}

/// A line of /proc/PID/maps, with one space between two columns.
fn expected_line(line: &str) -> Result<String> {
    let mut rest = line;
    let mut fields = Vec::new();
    for _ in 0..5 {
        let (field, behind) =
            rest.trim_start().split_once(' ').with_context(|| format!("{line:?} is cut off"))?;
        fields.push(field);
        rest = behind;
    }
    // A path with a line break; what is there else is not escaped.
    let name = rest.trim_start_matches(' ').replace("\\012", "\n");
    Ok(format!("{} {name}", fields.join(" ")))
}

fn line(row: &Value) -> Result<String> {
    let address = |key| {
        Ok::<_, anyhow::Error>(u64::from_str_radix(text(row, key)?.trim_start_matches("0x"), 16)?)
    };
    let (start, end, offset) = (address("start")?, address("end")?, address("offset")?);
    let (major, minor, inode) =
        (number(row, "major")?, number(row, "minor")?, number(row, "inode")?);
    let name = row["path"].as_str().or_else(|| row["label"].as_str()).unwrap_or_default();
    let deleted = if row["deleted"] == true { " (deleted)" } else { "" };
    let permissions = text(row, "permissions")?;
    Ok(format!(
        "{start:08x}-{end:08x} {permissions} {offset:08x} {major:02x}:{minor:02x} {inode} {name}{deleted}"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Twelve processes with a hundred mappings each.
    fn truth() -> (Truth, Vec<Value>) {
        let (mut sections, mut rows) = (String::new(), Vec::new());
        for pid in 10..22 {
            let mut maps = String::new();
            for index in 0..100u64 {
                let (start, end) = (0x40_0000 + index * 0x2000, 0x40_1000 + index * 0x2000);
                maps += &format!(
                    "{start:08x}-{end:08x} r-xp 00001000 00:17 2                  /tmp/a\\012b (deleted)\n"
                );
                rows.push(json!({"pid": pid, "start": format!("{start:#x}"), "end": format!("{end:#x}"), "permissions": "r-xp",
                    "offset": "0x1000", "major": 0, "minor": 23, "inode": 2, "path": "/tmp/a\nb", "deleted": true, "label": null,
                    "torn": false}));
            }
            maps += "7ffd00000000-7ffd00001000 rw-p 00000000 00:00 0 \n";
            rows.push(json!({"pid": pid, "start": "0x7ffd00000000", "end": "0x7ffd00001000", "permissions": "rw-p", "offset": "0x0",
                "major": 0, "minor": 0, "inode": 0, "path": null, "deleted": false, "label": null, "torn": false}));
            for (name, text) in [("maps", maps), ("stat", String::new())] {
                sections += &format!("@/proc/{pid}/{name} {}\n{text}\n", text.len());
            }
        }
        (Truth::parse(format!("{sections}@end 0\n\n").as_bytes()).unwrap(), rows)
    }

    #[test]
    fn maps_that_differ_are_found() {
        let (truth, rows) = truth();
        maps(&truth, &rows).unwrap();
        for key in [
            "start",
            "end",
            "permissions",
            "offset",
            "major",
            "minor",
            "inode",
            "path",
            "deleted",
            "torn",
        ] {
            let mut wrong = rows.clone();
            wrong[1][key] = match &wrong[1][key] {
                Value::Bool(is_so) => json!(!is_so),
                Value::Number(number) => json!(number.as_u64().unwrap() + 1),
                _ if key == "path" || key == "permissions" => json!("x"),
                _ => json!("0x1"),
            };
            assert!(maps(&truth, &wrong).is_err(), "{key}");
        }
        let mut labelled = rows.clone();
        labelled[100]["label"] = json!("[heap]");
        assert!(maps(&truth, &labelled).is_err());
        assert!(
            maps(&truth, &rows[1..]).is_err() && maps(&truth, &rows[..rows.len() - 1]).is_err()
        );
        let one_more = json!({"pid": 99, "start": "0x1000", "end": "0x2000", "permissions": "r--p", "offset": "0x0", "major": 0,
            "minor": 0, "inode": 0, "path": null, "deleted": false, "label": null, "torn": false});
        assert!(maps(&truth, &[rows, vec![one_more]].concat()).is_err());
    }

    #[test]
    fn bytes_and_permissions_that_differ_are_found() {
        let hex: String = HIDDEN.1.bytes().map(|byte| format!("{byte:02x}")).collect();
        let row = json!({"gva": "0x300000000000", "hex": hex});
        has_bytes(std::slice::from_ref(&row), HIDDEN).unwrap();
        assert!(
            has_bytes(&[row.clone(), row.clone()], HIDDEN).is_err()
                && has_bytes(&[row], TEXT).is_err()
        );
        let row = |gva: u64, writable, executable| json!({"gva": format!("{gva:#x}"), "gpa": "0x1", "user": true, "writable": writable, "executable": executable});
        translated(&[row(TEXT.0, true, false), row(CODE, false, true)]).unwrap();
        assert!(translated(&[row(TEXT.0, true, false), row(CODE, false, false)]).is_err());
        assert!(translated(&[row(TEXT.0, false, false), row(CODE, false, true)]).is_err());
    }
}

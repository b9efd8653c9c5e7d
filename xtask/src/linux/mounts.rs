// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem mounts`, compared with /proc/PID/mountinfo: of the first process, of one in another
//! namespace, and of one in a root of its own there.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::compare::{number, process_ids, text};
use super::memory::Verb;
use super::truth::Truth;

/// Verbs about mounts.
pub(super) fn verbs(truth: &Truth) -> Result<Vec<Verb<'_>>> {
    let verb = |pid: u64, least: usize| -> Verb<'_> {
        let words = ["mounts", "--pid", &pid.to_string()].map(str::to_owned).to_vec();
        (words, Box::new(move |rows| compare(truth, pid, least, rows)))
    };
    let mut verbs = vec![verb(1, 6)];
    for (name, least) in [("contained", 7), ("contained child", 1)] {
        let is_it = |pid: &u64| {
            truth.text(&format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name)
        };
        let pid = process_ids(truth)
            .find(is_it)
            .with_context(|| format!("the guest has no process {name:?}"))?;
        verbs.push(verb(pid, least));
    }
    Ok(verbs)
}

fn compare(truth: &Truth, pid: u64, least: usize, rows: &[Value]) -> Result<()> {
    let mounts = truth.text(&format!("/proc/{pid}/mountinfo"))?;
    let mut expected = mounts.lines().map(expected_line).collect::<Result<Vec<_>>>()?;
    let mut found = rows.iter().map(line).collect::<Result<Vec<_>>>()?;
    expected.sort_unstable();
    found.sort_unstable();
    ensure!(expected.len() >= least, "the guest shows {} mounts only", expected.len());
    ensure!(found == expected, "the mounts are {found:#?}, and should be {expected:#?}");
    Ok(())
}

/// What `mounts` has of a line: all but groups of mounts, and options of the file system's own.
fn expected_line(line: &str) -> Result<String> {
    let (mount, system) =
        line.split_once(" - ").with_context(|| format!("{line:?} is no mount"))?;
    let mount: Vec<&str> = mount.split(' ').take(6).collect();
    let [kind, source, options] = system.split(' ').collect::<Vec<_>>()[..] else {
        bail!("{line:?} has no file system");
    };
    let access = options.split(',').next().unwrap_or_default();
    Ok(format!("{} {kind} {source} {access}", mount.join(" ")))
}

fn line(row: &Value) -> Result<String> {
    let options = row["options"].as_array().context("it has no options")?;
    let options: Vec<_> = options.iter().filter_map(Value::as_str).collect();
    let device = format!("{}:{}", number(row, "major")?, number(row, "minor")?);
    let place = |key| Ok::<_, anyhow::Error>(escape(text(row, key)?));
    Ok(format!(
        "{} {} {device} {} {} {} {} {} {}",
        number(row, "id")?,
        number(row, "parent")?,
        place("root")?,
        place("point")?,
        options.join(","),
        place("type")?,
        place("source")?,
        if row["super_read_only"] == true { "ro" } else { "rw" },
    ))
}

/// As /proc escapes white space.
fn escape(text: &str) -> String {
    let escape = |c| match c {
        ' ' | '\t' | '\n' | '\\' => format!("\\{:03o}", u32::from(c)),
        c => c.to_string(),
    };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn mounts_that_differ_are_found() {
        let line = "41 40 0:29 /a\\040b /mnt/inner rw,nodev,noatime shared:3 - tmpfs in\\040ner ro,inode64\n";
        let text = format!("@/proc/7/mountinfo {}\n{line}\n@end 0\n\n", line.len());
        let truth = Truth::parse(text.as_bytes()).unwrap();
        let row = json!({"id": 41, "parent": 40, "major": 0, "minor": 29, "root": "/a b", "point": "/mnt/inner",
            "options": ["rw", "nodev", "noatime"], "type": "tmpfs", "source": "in ner", "super_read_only": true});
        compare(&truth, 7, 1, std::slice::from_ref(&row)).unwrap();
        for key in [
            "id",
            "parent",
            "major",
            "minor",
            "root",
            "point",
            "options",
            "type",
            "source",
            "super_read_only",
        ] {
            let mut wrong = row.clone();
            wrong[key] = match &wrong[key] {
                Value::Bool(_) => json!(false),
                Value::Number(_) => json!(7),
                Value::Array(_) => json!(["rw", "nodev"]),
                _ => json!("/x"),
            };
            assert!(compare(&truth, 7, 1, &[wrong]).is_err(), "{key}");
        }
        assert!(
            compare(&truth, 7, 1, &[row.clone(), row]).is_err()
                && compare(&truth, 7, 1, &[]).is_err()
        );
    }
}

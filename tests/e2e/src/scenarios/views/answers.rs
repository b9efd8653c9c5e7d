// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The demo's third act: processes, log and modules of a Linux target, read from its memory in the
//! introspector's guest and on the host.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use kvmmem_client::admin::GrantRequest;
use kvmmem_guest::Command;
use serde_json::Value;

use crate::report::Report;
use crate::world::{CLI, TARGET, World};

/// How long one verb may take in the guest.
const LIMIT: Duration = Duration::from_secs(120);

/// A verb, and the fields of its rows that stay as they are while the target runs.
const VERBS: [(&str, &[&str]); 4] = [
    ("ps", &["pid", "ppid", "uid", "comm", "args", "start_ms", "task"]),
    ("modules", &["name", "module", "size"]),
    ("dmesg", &["seq", "time_us", "text"]),
    ("info", &["release", "version", "host_name", "build_id", "command_line", "cr3", "note"]),
];

/// A process of the kernel that comes and goes by itself.
const WORKER: &str = "kworker/";

/// The program in the target that a rule is to find.
const PROGRAM: &str = "kvmmem-probe";

pub(crate) fn answers(world: &mut World, report: &mut Report) -> Result<()> {
    let grant = world.grant_as(|request| GrantRequest { uses: 100, ..request })?;
    let token = grant.token.to_hex();
    for (verb, fields) in VERBS {
        let command = Command::new(CLI)
            .as_member()
            .env("KVMMEM_TOKEN", token.as_str())
            .args([verb, "--json"]);
        let output = world.agent()?.run(&command, LIMIT)?;
        let is_done = output.status.success();
        if !report.check(format!("{verb} in the introspector"), is_done, output.error_text().trim())
        {
            continue;
        }
        let guest = rows(&output.text(), fields)?;
        let host = rows(&world.kvmmem(&[verb, "--json", "--target", TARGET])?, fields)?;
        let missing: Vec<_> = guest.difference(&host).take(3).collect();
        report.check(
            format!("{verb} shows the same rows on the host"),
            !guest.is_empty() && missing.is_empty(),
            format!("{} rows, {missing:?}", guest.len()),
        );
        for line in world
            .kvmmem(&[verb, "--target", TARGET])?
            .lines()
            .filter(|line| !is_kernel(line))
            .take(8)
        {
            report.say(&format!("       {line}"));
        }
    }
    let processes = world.kvmmem(&["ps", "--json", "--target", TARGET])?;
    report.check("ps shows the target's own program", processes.contains(PROGRAM), "");
    let directory = tempfile::tempdir().context("no place for a rule")?;
    let rule = directory.path().join("marker.yar");
    let text =
        format!("rule marker {{ strings: $a = {{ {} }} condition: $a }}\n", world.marker()?.hex);
    std::fs::write(&rule, text).context("cannot write a rule")?;
    let rule = rule.to_str().context("the rule's path is no text")?;
    let found = world.kvmmem(&["scan", "--yara", rule, "--target", TARGET, "--json"])?;
    let place = format!("\"{:#x}\"", world.gpa()?);
    report.check(
        "a YARA rule matches the marker",
        found.contains("marker") && found.contains(&place),
        "",
    );
    for line in world.kvmmem(&["scan", "--yara", rule, "--target", TARGET])?.lines().take(3) {
        report.say(&format!("       {line}"));
    }
    world.revoke(grant.grant)?;
    Ok(())
}

/// The rows of a verb as JSON, of these fields alone, without what the kernel starts and ends by
/// itself.
fn rows(text: &str, fields: &[&str]) -> Result<BTreeSet<String>> {
    let mut rows = BTreeSet::new();
    for line in text.lines() {
        let row: Value =
            serde_json::from_str(line).with_context(|| format!("{line:?} is no JSON"))?;
        if !row["comm"].as_str().is_some_and(|comm| comm.starts_with(WORKER)) {
            let values: Option<Vec<_>> = fields.iter().map(|field| row.get(field)).collect();
            let values = values.with_context(|| format!("{line} lacks one of {fields:?}"))?;
            rows.insert(serde_json::to_string(&values)?);
        }
    }
    Ok(rows)
}

/// Whether a line is of one of the kernel's own threads.
fn is_kernel(line: &str) -> bool {
    line.ends_with(']')
}

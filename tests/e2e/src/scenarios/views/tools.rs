// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line's verbs on a view, where the tool runs and on the host.

use std::process::Command as HostCommand;
use std::time::Duration;

use anyhow::{Context, Result};
use kvmmem_client::admin::GrantRequest;
use kvmmem_guest::Command;
use kvmmem_proto::scope::Span;

use crate::report::Report;
use crate::world::{CLI, World};

/// How long one verb may take in the guest.
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn tools(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let marker = world.marker()?.hex.clone();
    // The page, and some around it that were used as well.
    let from = gpa & !0xf_ffff;
    let span = Span { gpa: from, len: 0x10_0000 };
    let grant =
        world.grant_as(|request| GrantRequest { spans: Some(vec![span]), uses: 100, ..request })?;
    let token = grant.token.to_hex();
    let range = format!("{from:#x}..{:#x}", from + span.len);

    let guest = |world: &World, arguments: &[&str]| -> Result<kvmmem_guest::Output> {
        let command = Command::new(CLI)
            .as_member()
            .env("KVMMEM_TOKEN", token.as_str())
            .args(arguments.iter().copied());
        Ok(world.agent()?.run(&command, LIMIT)?)
    };
    let output = guest(world, &["attach", "--json"])?;
    report.check(
        "attach shows the view",
        output.status.success() && output.text().contains("ranges"),
        said(&output),
    );
    let output = guest(world, &["scan", &marker, "--range", &range, "--json"])?;
    let place = format!("\"{gpa:#x}\"");
    report.check(
        "scan finds the marker",
        output.status.success() && output.text().contains(&place),
        said(&output),
    );
    let output = guest(world, &["scan", &"5a".repeat(40), "--range", &range])?;
    report.check(
        "scan finds nothing where nothing is",
        output.status.shell_code() == 1,
        said(&output),
    );
    let output = guest(world, &["dump", "/tmp/dump.raw", "--range", &range])?;
    report.check("dump writes a file", output.status.success(), said(&output));
    let output = guest(world, &["read", &format!("{gpa:#x}"), "32", "--json"])?;
    report.check(
        "read shows the marker",
        output.status.success() && output.text().contains(&marker),
        said(&output),
    );
    let output = guest(world, &["doctor"])?;
    report.check("doctor knows of views", output.text().contains("view"), said(&output));

    let dump = tempfile::tempdir().context("no place for a dump")?;
    let file = dump.path().join("core");
    let output = HostCommand::new(world.bed.bin("kvmmem"))
        .args(["dump", "--format", "elf", "--broker"])
        .arg(world.socket())
        .arg(&file)
        .env("KVMMEM_TOKEN", token.as_str())
        .env("KVMMEM_DEVICE", "/nonexistent")
        .output()
        .context("cannot run kvmmem")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    report.check("the same verb dumps on the host", output.status.success(), text.trim());
    let core = std::fs::read(&file).unwrap_or_default();
    let bytes: Vec<u8> = (0..marker.len() / 2)
        .filter_map(|index| u8::from_str_radix(marker.get(2 * index..2 * index + 2)?, 16).ok())
        .collect();
    report.check("as an ELF core", core.starts_with(b"\x7fELF"), format!("{} bytes", core.len()));
    report.check(
        "with the marker in it",
        core.windows(bytes.len()).any(|window| window == bytes),
        "",
    );

    let listing = world.kvmmem(&["grant", "list"])?;
    report.check(
        "grant list has the grant",
        listing.contains(&grant.grant.to_string()),
        listing.trim(),
    );
    world.kvmmem(&["grant", "revoke", &grant.grant.to_string()])?;
    let output = guest(world, &["attach"])?;
    report.check(
        "after revoke the token is worth nothing, and the message says what to do",
        !output.status.success() && output.error_text().contains("token"),
        said(&output),
    );
    Ok(())
}

/// How a verb ended, for the report.
fn said(output: &kvmmem_guest::Output) -> String {
    let text = output.error_text();
    format!("{} {}", output.status, text.trim())
}

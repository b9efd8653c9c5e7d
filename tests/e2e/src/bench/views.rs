// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench views`: what a view costs against the guest's own memory, against KVMI, and
//! by size.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvmmem::Token;
use kvmmem_client::admin::GrantRequest;
use kvmmem_guest::{Agent, Command};
use kvmmem_probe::Samples;

use super::row::{Row, find};
use crate::sparse::Sparse;
use crate::test_bed::TestBed;
use crate::world::{BENCH, PROBE, World};

/// Rounds of each series.
const ROUNDS: usize = 30;
/// Bytes of the target that are read, from [`FROM`] on: RAM that its kernel has used.
pub(super) const LENGTH: u64 = 32 << 20;
pub(super) const FROM: u64 = 16 << 20;
/// Pages that are read here and there.
const SCATTERED: usize = 512;
/// How long one part may take in the guest.
pub(super) const LIMIT: Duration = Duration::from_secs(600);

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut world = World::start(TestBed::from_env()?)?;
    // The marker's page stays what it is, a page of RAM; its program would only take time from what
    // is measured.
    let marker = world.marker()?;
    marker.child.kill(9)?;
    marker.child.wait(LIMIT)?;
    let memory = in_guest(&mut world, "target", "memory", LENGTH)?;
    let mut rows = memory_rows(&memory)?;
    let small = Sparse::register(&world, "sparse-1g", 1 << 30)?;
    let large = Sparse::register(&world, "sparse-64g", 64 << 30)?;
    let (one, many) = (
        in_guest(&mut world, small.name, "attach", 0)?,
        in_guest(&mut world, large.name, "attach", 0)?,
    );
    rows.push(Row::slower(
        "attach of 64 GiB, against 1 GiB",
        1.2,
        find(&many, "attach")?,
        1,
        find(&one, "attach")?,
    )?);
    let (untouched, touched) = (
        in_guest(&mut world, "target", "attach", 0)?,
        in_guest(&mut world, "target", "attach", LENGTH)?,
    );
    rows.push(Row::slower(
        "detach after 32 MiB were touched, against none",
        1.5,
        find(&touched, "detach")?,
        1,
        find(&untouched, "detach")?,
    )?);
    let reads = scattered(&mut world)?;
    rows.push(Row::faster(
        "512 scattered pages by pread, against KVMI",
        20.0,
        find(&reads, "pread")?,
        find(&reads, "KVMI")?,
    )?);
    rows.push(Row::faster(
        "512 scattered pages by mapping, against KVMI",
        20.0,
        find(&reads, "mapping")?,
        find(&reads, "KVMI")?,
    )?);
    Ok(rows)
}

/// What a view costs once it is open, against the guest's own memory: of the series that the tool
/// in C calls `memory`.
pub(super) fn memory_rows(memory: &[Samples]) -> Result<Vec<Row>> {
    let find = |name| find(memory, name);
    Ok(vec![
        Row::faster(
            "sequential read, against own memory",
            0.95,
            find("sequential, view")?,
            find("sequential, own")?,
        )?,
        Row::faster(
            "8-byte reads here and there, against own memory",
            0.9,
            find("scattered, view")?,
            find("scattered, own")?,
        )?,
        Row::slower(
            "first touch by 4 KiB, against a minor fault",
            1.3,
            find("first touch, 4 KiB")?,
            1,
            find("minor fault")?,
        )?,
        Row::slower(
            "first touch by 2 MiB, per 4 KiB, against a minor fault",
            0.01,
            find("first touch, 2 MiB")?,
            1,
            find("minor fault")?,
        )?,
        Row::slower(
            "open with 10,000 areas mapped, against /dev/null",
            1.2,
            find("open, device")?,
            1,
            find("open, null")?,
        )?,
    ])
}

/// What the tool in C times in the introspector.
fn in_guest(world: &mut World, target: &str, what: &str, length: u64) -> Result<Vec<Samples>> {
    let grant = world.grant_as(|request| GrantRequest {
        target: target.to_owned(),
        uses: 2 * u32::try_from(ROUNDS).unwrap_or(u32::MAX),
        ttl_ms: 3_600_000,
        ..request
    })?;
    time(&world.bed, world.agent()?, &grant.token, what, length)
}

/// What the tool in C times in a guest: `length` bytes from [`FROM`] on, by what it attaches with.
pub(super) fn time(
    bed: &TestBed,
    agent: &Agent,
    token: &Token,
    what: &str,
    length: u64,
) -> Result<Vec<Samples>> {
    let bench = std::fs::read(bed.bin("kvmmem-bench")).context("no bench in the bed")?;
    agent.put(BENCH, 0o755, &bench)?;
    let mut command = Command::new(BENCH).as_member().arg(what);
    command = command.args([FROM.to_string(), length.to_string(), ROUNDS.to_string()]);
    command = command.args(token.words().map(|word| format!("{word:#x}")));
    let output = agent.run(&command, LIMIT)?;
    ensure!(output.status.success(), "the bench failed: {} {}", output.status, output.error_text());
    output
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("the bench says {line:?}")))
        .collect()
}

/// The same pages by KVMI and by a view, in the library that tools use.
fn scattered(world: &mut World) -> Result<Vec<Samples>> {
    let port = world.hook_port()?;
    let grant = world.grant_as(|request| request)?;
    let token = grant.token.to_hex();
    let command = Command::new(PROBE).as_member().env("KVMMEM_TOKEN", token.as_str()).args([
        "scattered",
        "--port",
        &port.to_string(),
        "--from",
        &FROM.to_string(),
        "--len",
        &LENGTH.to_string(),
        "--pages",
        &SCATTERED.to_string(),
    ]);
    let output = world.agent()?.run(&command, LIMIT)?;
    ensure!(output.status.success(), "the probe failed: {} {}", output.status, output.error_text());
    let text = output.text();
    let series = text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect::<Result<_>>();
    world.unhook_port(port)?;
    series
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench qemu`: what views cost in introspectors under stock QEMUs, where they come as
//! PCI devices.

use anyhow::{Context, Result};
use kvmmem::Token;
use kvmmem_client::admin::GrantRequest;
use kvmmem_proto::guest::GUEST_PORT;

use super::row::Row;
use super::views::{self, LENGTH};
use super::without_module;
use crate::qemu::{Ram, Release, Spec};
use crate::test_bed::TestBed;
use crate::world::World;

/// How often a view is opened.
const ROUNDS: usize = 20;

/// How long it may take from the token to the first bytes, nanoseconds.
const GOAL: u64 = 150_000_000;

/// The newest QEMU.
const Q35: Spec = Spec {
    name: "bench-q35",
    release: Release::Trixie,
    machine: "q35",
    mib: 512,
    ram: Ram::Memfd,
    cid: 21,
    // The emulated CPU is an AMD one with 40 address bits, and smaller ports would lie in its
    // HyperTransport hole.
    largest: "5G",
    kernel: None,
};

/// Debian 12's.
const PC: Spec =
    Spec { name: "bench-pc", release: Release::Bookworm, machine: "pc", cid: 22, ..Q35 };

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut world = World::start(TestBed::from_env()?)?;
    let marker = world.marker()?;
    let gpa = *marker.gpas.first().context("the marker has no page")?;
    // Its page stays what it is; the program would only take time from what is measured.
    marker.child.kill(9)?;
    let mut rows =
        vec![opening(&mut world, &PC, "token to first bytes, 7.2 pc, against 150 ms", gpa)?];
    world.end_qemu(&PC);
    rows.push(opening(&mut world, &Q35, "token to first bytes, 11.1 q35, against 150 ms", gpa)?);
    rows.extend(using(&world, &Q35)?);
    rows.extend(without_module::rows(&world, &Q35)?);
    Ok(rows)
}

/// How long it takes until a view is open.
fn opening(world: &mut World, spec: &Spec, name: &'static str, gpa: u64) -> Result<Row> {
    let socket = world.boot_qemu(spec)?.socket().display().to_string();
    world.kvmmem(&["introspector", "add", "--qmp", &socket])?;
    let token = token(world)?.to_hex();
    let mut tool = world.qemu_viewer(spec)?;
    let mut opened = Vec::new();
    for _ in 0..ROUNDS {
        let micros = tool.must(&format!("first {GUEST_PORT} {} {gpa:#x}", token.as_str()))?;
        world.settles(0)?;
        opened.push(micros.parse::<u64>().context("the tool says no time")? * 1000);
    }
    Row::slower(name, 1.0, &opened, 1, &[GOAL])
}

/// What it costs to use one.
fn using(world: &World, spec: &Spec) -> Result<Vec<Row>> {
    // The tool keeps the connection open, the bench takes the view.
    let mut tool = world.qemu_viewer(spec)?;
    let answer = tool.must(&format!("ask {GUEST_PORT} ro {}", token(world)?.to_hex().as_str()))?;
    let ticket: Token =
        answer.split(' ').nth(1).unwrap_or_default().parse().context("no ticket")?;
    let memory = views::time(&world.bed, &world.qemu(spec)?.agent, &ticket, "memory", LENGTH)?;
    views::memory_rows(&memory)
}

fn token(world: &World) -> Result<Token> {
    let grant =
        world.grant_as(|request| GrantRequest { uses: 100, ttl_ms: 3_600_000, ..request })?;
    Ok(grant.token)
}

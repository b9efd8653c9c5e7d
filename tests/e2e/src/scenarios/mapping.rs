// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What mapping is for.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use kvmmem_client::admin::GrantRequest;
use kvmmem_guest::{Child, Command};
use kvmmem_probe::{More, Step};
use kvmmem_proto::scope::Rights;

use crate::qemu::Spec;
use crate::report::Report;
use crate::wait::PATIENCE;
use crate::world::{PROBE, World};

/// What the tour writes into the target's inbox.
const MESSAGE: u64 = 0x6b76_6d6d_656d_2021;

pub(crate) fn map_basic(world: &mut World, report: &mut Report) -> Result<()> {
    let port = world.hook_port()?;
    tour(world, report, port)?;
    world.unhook_port(port)
}

/// The demo's tool once around, and that the target saw its message.
pub(crate) fn tour(world: &mut World, report: &mut Report, port: u32) -> Result<()> {
    tour_in(world, report, None, port)
}

/// The same in a VM under a stock QEMU.
pub(crate) fn tour_in(
    world: &mut World,
    report: &mut Report,
    spec: Option<&Spec>,
    port: u32,
) -> Result<()> {
    let gpa = world.gpa()?;
    let marker = world.marker()?.hex.clone();
    let command = Command::new(PROBE).as_member().memlock(1 << 20).args([
        "tour",
        "--port",
        &port.to_string(),
        "--gpa",
        &gpa.to_string(),
        "--marker",
        &marker,
        "--message",
        &MESSAGE.to_string(),
    ]);
    let child = world.agent_of(spec)?.spawn(&command)?;
    relay(world, child, report)?;
    report.check("the program in the target saw what the tool stored", world.inbox(MESSAGE)?, "");
    // So that the next tour's message is a change again.
    world.session()?.write_physical(gpa + kvmmem_probe::INBOX as u64, &0u64.to_le_bytes())?;
    world.inbox(0).map(drop)
}

/// Passes a probe's steps on to the report, and tokens to the probe where it asks for them.
pub(crate) fn relay(world: &mut World, mut child: Child, report: &mut Report) -> Result<()> {
    while let Some(line) = next_line(world, &mut child)? {
        let step: Step =
            serde_json::from_str(&line).with_context(|| format!("the probe says {line:?}"))?;
        report.timed(step.what, step.ok, step.detail, Duration::from_nanos(step.nanos));
    }
    let status = child.wait(PATIENCE)?;
    if !status.success() {
        bail!("the probe failed, {status}: {}", child.take_stderr());
    }
    Ok(())
}

/// The next line of a probe, other than requests for tokens, which are answered.
pub(crate) fn next_line(world: &mut World, child: &mut Child) -> Result<Option<String>> {
    loop {
        let Some(line) = child.read_line(PATIENCE)? else { return Ok(None) };
        let Ok(More { more }) = serde_json::from_str(&line) else { return Ok(Some(line)) };
        let uses = u32::try_from(more)?;
        let grant =
            world.grant_as(|usual| GrantRequest { rights: Rights::ReadWrite, uses, ..usual })?;
        let [a, b, c, d] = grant.token.words();
        child.write_stdin(format!("{a:x} {b:x} {c:x} {d:x}\n").repeat(more).as_bytes())?;
    }
}

pub(crate) fn many_mappings(world: &mut World, report: &mut Report) -> Result<()> {
    let child = crowd(world, None, None, 4096)?;
    relay(world, child, report)
}

pub(crate) fn two_processes(world: &mut World, report: &mut Report) -> Result<()> {
    let (first, second) = (world.hook_port()?, world.hook_port()?);
    let children = [crowd(world, None, Some(first), 100)?, crowd(world, None, Some(second), 100)?];
    for child in children {
        relay(world, child, report)?;
    }
    world.unhook_port(first)?;
    world.unhook_port(second)
}

/// Many mappings at once, in the introspector or a VM under a stock QEMU; without a port the tokens
/// come from the scenario.
pub(crate) fn crowd(
    world: &mut World,
    spec: Option<&Spec>,
    port: Option<u32>,
    mappings: usize,
) -> Result<Child> {
    let marker = world.marker()?;
    let list: String = marker.gpas.iter().map(|gpa| format!("{gpa}\n")).collect();
    let hex = marker.hex.clone();
    let agent = world.agent_of(spec)?;
    agent.put("/tmp/gpas", 0o644, list.as_bytes())?;
    let mut command =
        Command::new(PROBE).as_member().memlock(64 << 20).args(["crowd", "--marker", &hex]);
    command = command.args(["--gpas", "/tmp/gpas", "--mappings", &mappings.to_string()]);
    if let Some(port) = port {
        command = command.args(["--port", &port.to_string()]);
    }
    Ok(agent.spawn(&command)?)
}

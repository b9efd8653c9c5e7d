//! What mapping is for.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use kvmmem_guest::{Child, Command};
use kvmmem_probe::{Placed, Step};

use crate::report::Report;
use crate::world::{PROBE, World};

/// How long a probe may take for one step.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the tour writes into the target's inbox.
const MESSAGE: u64 = 0x6b76_6d6d_656d_2021;

pub(crate) fn map_basic(world: &mut World, report: &mut Report) -> Result<()> {
    let port = world.hook_port()?;
    tour(world, report, port)?;
    world.unhook_port(port)
}

/// The demo's tool once around, and that the target saw its message.
pub(crate) fn tour(world: &mut World, report: &mut Report, port: u32) -> Result<()> {
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
    let child = world.agent()?.spawn(&command)?;
    relay(child, report)?;
    let line = world.marker()?.child.read_line(Duration::from_secs(20))?;
    let seen = line.as_deref().map(serde_json::from_str).transpose().context("the marker says nonsense")?;
    report.check(
        "the program in the target saw what the tool stored",
        seen == Some(Placed::Inbox { value: MESSAGE }),
        format!("{seen:?}"),
    );
    // So that the next tour's message is a change again.
    world.session()?.write_physical(gpa + kvmmem_probe::INBOX as u64, &0u64.to_le_bytes())?;
    world.marker()?.child.read_line(Duration::from_secs(20))?;
    Ok(())
}

/// Passes a probe's steps on to the report.
pub(crate) fn relay(mut child: Child, report: &mut Report) -> Result<()> {
    while let Some(line) = child.read_line(PATIENCE)? {
        let step: Step = serde_json::from_str(&line).with_context(|| format!("the probe says {line:?}"))?;
        report.timed(step.what, step.ok, step.detail, Duration::from_nanos(step.nanos));
    }
    let status = child.wait(PATIENCE)?;
    if !status.success() {
        bail!("the probe failed, {status}: {}", child.take_stderr());
    }
    Ok(())
}

pub(crate) fn many_mappings(world: &mut World, report: &mut Report) -> Result<()> {
    let port = world.hook_port()?;
    relay(crowd(world, port, 4096)?, report)?;
    world.unhook_port(port)
}

pub(crate) fn two_processes(world: &mut World, report: &mut Report) -> Result<()> {
    let (first, second) = (world.hook_port()?, world.hook_port()?);
    let children = [crowd(world, first, 200)?, crowd(world, second, 200)?];
    for child in children {
        relay(child, report)?;
    }
    world.unhook_port(first)?;
    world.unhook_port(second)
}

fn crowd(world: &mut World, port: u32, mappings: usize) -> Result<Child> {
    let marker = world.marker()?;
    let list: String = marker.gpas.iter().map(|gpa| format!("{gpa}\n")).collect();
    let hex = marker.hex.clone();
    let agent = world.agent()?;
    agent.put("/tmp/gpas", 0o644, list.as_bytes())?;
    let command = Command::new(PROBE).as_member().memlock(64 << 20).args([
        "crowd",
        "--port",
        &port.to_string(),
        "--marker",
        &hex,
        "--gpas",
        "/tmp/gpas",
        "--mappings",
        &mappings.to_string(),
    ]);
    Ok(agent.spawn(&command)?)
}

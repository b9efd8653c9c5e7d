// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What other people's tools send and have met: inputs that went wrong once, each with its right
//! outcome.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use kvmmem_guest::Command;
use kvmmem_proto::scope::Rights;

use crate::raw::errno;
use crate::report::Report;
use crate::scenarios::Scenario;
use crate::scenarios::mapping::relay;
use crate::wait::{self, PATIENCE};
use crate::world::{CLI, PROBE, TARGET, World};

/// The scenarios of this file, in the order in which they run.
pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        name: "cases_batch",
        purpose: "KVMI: a batch with a command that is not offered leaves the tool in step",
        run: batch,
    },
    Scenario {
        name: "cases_kernel_gva",
        purpose: "v1 MAP refuses addresses in the kernel's half with EINVAL",
        run: kernel_gva,
    },
    Scenario {
        name: "cases_fork_unmap",
        purpose: "libkvmi unmaps a region while a child that it forked is alive",
        run: fork_unmap,
    },
    Scenario {
        name: "cases_resume",
        purpose: "a dump of a target that was restarted with its UUID is not resumed",
        run: resume,
    },
];

fn batch(world: &mut World, report: &mut Report) -> Result<()> {
    let port = world.hook_port()?;
    let command = Command::new(PROBE).as_member().args(["batch", "--port", &port.to_string()]);
    let child = world.agent()?.spawn(&command)?;
    relay(world, child, report)?;
    world.unhook_port(port)
}

fn kernel_gva(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let mut tool = world.raw()?;
    let device = tool.open()?;
    for gva in
        ["0xffff888000001000", "0xffffffff81000000", "0xfffffffffffff000", "0x8000000000000000"]
    {
        let token = world.token()?;
        let seen = errno(tool.map(&device, gva, gpa, token)?);
        report.equal(format!("MAP at {gva} is refused"), &seen, &"EINVAL".into());
    }
    Ok(())
}

fn fork_unmap(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let end = world.max_gfn()? << 12;
    let marker = world.marker()?.hex.clone();
    let uuid = world.uuid(TARGET)?;
    let mut tool = world.viewer()?;
    let device = tool.open()?;
    tool.must(&format!("region {device} open {}", uuid.simple()))?;
    for round in ["a region", "and again"] {
        let [a, b, c, d] = world.token()?;
        let mapped =
            tool.ask(&format!("region {device} map {gpa:#x} {a:#x} {b:#x} {c:#x} {d:#x}"))?;
        report.equal(format!("{round}: MAP"), &mapped, &Ok(format!("0x0 {end:#x}")));
        let at = tool.must(&format!("mmap {device} 0 {end:#x} rw shared"))?;
        let page = format!("{:#x}", u64::from_str_radix(at.trim_start_matches("0x"), 16)? + gpa);
        report.equal("it shows the marker", &tool.load(&page, 32)?, &Ok(marker.clone()));
        tool.must("hold")?;
        let seen = errno(tool.ask(&format!("fork load {page} 8"))?);
        report.equal("a child has no copy of it", &seen, &"SIGSEGV".into());
        tool.must(&format!("munmap {at} {end:#x}"))?;
        let seen = errno(tool.ask(&format!("region {device} unmap 0"))?);
        report.equal("UNMAP works while children are alive", &seen, &"0".into());
    }
    Ok(())
}

/// How long the end of a dump is waited for between looks at its file.
const TICK: Duration = Duration::from_millis(10);

/// SIGINT.
const INTERRUPT: i32 = 2;

fn resume(world: &mut World, report: &mut Report) -> Result<()> {
    let file = interrupted_dump(world)?;
    let before = world.uuid(TARGET)?;
    world.target_mut()?.process.kill()?;
    let is_gone = wait::until(|| Ok(!world.has(TARGET)?))?;
    ensure!(is_gone, "the broker still lists the target");
    world.mend()?;
    let after = world.uuid(TARGET)?;
    report.equal("the target is restarted with its UUID", &after, &before);

    let resumed = dump(world, &[&file, "--resume"])?;
    let output = world.agent()?.run(&resumed, PATIENCE)?;
    report.check(
        "a dump of what ran before is not resumed",
        !output.status.success(),
        output.status,
    );
    let text = output.error_text();
    report.check("and the message says what to do", text.contains("begin again"), text.trim());
    Ok(())
}

/// The verb, with a token of its own.
fn dump(world: &World, arguments: &[&str]) -> Result<Command> {
    let token = world.grant(Rights::ReadOnly, None)?.token.to_hex();
    let command = Command::new(CLI).as_member().env("KVMMEM_TOKEN", token.as_str());
    Ok(command.arg("dump").args(arguments.iter().copied()))
}

/// Leaves an unfinished dump in the introspector; its file.
fn interrupted_dump(world: &World) -> Result<String> {
    let agent = world.agent()?;
    // A quick machine may have finished one before it can be interrupted.
    for number in 0..20 {
        let file = format!("/tmp/cases-{number}.raw");
        let mut child = agent.spawn(&dump(world, &[&file])?)?;
        let part = format!("{file}.part");
        let is_begun = wait::until(|| Ok(agent.get(&part).is_ok() || child.wait(TICK).is_ok()))?;
        ensure!(is_begun, "the dump does not begin: {}", child.take_stderr());
        child.kill(INTERRUPT)?;
        if !child.wait(PATIENCE)?.success() {
            return Ok(file);
        }
    }
    bail!("the dump cannot be interrupted: it is too quick")
}

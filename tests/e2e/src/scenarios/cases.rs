// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What other people's tools send and have met: inputs that went wrong once, each with its right outcome.

use anyhow::{Context, Result};
use kvmmem_guest::Command;

use crate::raw::errno;
use crate::report::Report;
use crate::scenarios::Scenario;
use crate::scenarios::mapping::relay;
use crate::world::{PROBE, TARGET, World};

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
    for gva in ["0xffff888000001000", "0xffffffff81000000", "0xfffffffffffff000", "0x8000000000000000"] {
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
    let uuid = world.targets()?.into_iter().find(|vm| vm.name == TARGET).context("no target")?.uuid;
    let mut tool = world.viewer()?;
    let device = tool.open()?;
    tool.must(&format!("region {device} open {}", uuid.simple()))?;
    for round in ["a region", "and again"] {
        let [a, b, c, d] = world.token()?;
        let mapped = tool.ask(&format!("region {device} map {gpa:#x} {a:#x} {b:#x} {c:#x} {d:#x}"))?;
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

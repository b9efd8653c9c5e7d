// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The calls that libkvmi makes where its probe finds them.

use anyhow::Result;

use crate::raw::errno;
use crate::report::Report;
use crate::world::{TARGET, World};

pub(crate) fn regions(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let end = world.max_gfn()? << 12;
    let marker = world.marker()?.hex.clone();
    let uuid = world.uuid(TARGET)?;

    let slot = world.session()?.query_physical(gpa >> 12)?;
    report.equal(
        "QUERY_PHYSICAL names the region",
        &(slot.gfn.get() << 12, slot.pages.get() << 12),
        &(0, end),
    );

    let mut tool = world.viewer()?;
    let device = tool.open()?;
    let map = |gpa: u64, [a, b, c, d]: [u64; 4]| {
        format!("region {device} map {gpa:#x} {a:#x} {b:#x} {c:#x} {d:#x}")
    };
    report.equal(
        "the probe finds the region calls",
        &errno(tool.ask(&format!("region {device} unmap 0"))?),
        &"0".into(),
    );
    let token = world.token()?;
    report.equal(
        "MAP before OPEN is refused",
        &errno(tool.ask(&map(gpa, token))?),
        &"EINVAL".into(),
    );
    tool.must(&format!("region {device} open {}", uuid.simple()))?;
    report.equal(
        "MAP answers the whole region",
        &tool.ask(&map(gpa, token))?,
        &Ok(format!("0x0 {end:#x}")),
    );
    let token = world.token()?;
    report.equal(
        "a region that is there is said so",
        &errno(tool.ask(&map(gpa, token))?),
        &"EALREADY".into(),
    );
    let at = tool.must(&format!("mmap {device} 0 {end:#x} rw shared"))?;
    let page = format!("{:#x}", super::use_it::hex(&at)? + gpa);
    report.equal("mmap of it shows the marker", &tool.load(&page, 32)?, &Ok(marker));
    report.equal(
        "UNMAP of no region is refused",
        &errno(tool.ask(&format!("region {device} unmap 0x1000"))?),
        &"EINVAL".into(),
    );
    report.equal(
        "UNMAP of the region at gpa 0 works",
        &errno(tool.ask(&format!("region {device} unmap 0"))?),
        &"0".into(),
    );
    report.equal(
        "memory that is left of the last region shows nothing",
        &errno(tool.load(&page, 32)?),
        &"SIGBUS".into(),
    );
    tool.must(&format!("munmap {at} {end:#x}"))?;

    let other = tool.open()?;
    tool.must(&format!("region {other} open {}", "11".repeat(16)))?;
    let [a, b, c, d] = world.token()?;
    let wrong = tool.ask(&format!("region {other} map {gpa:#x} {a:#x} {b:#x} {c:#x} {d:#x}"))?;
    report.check("the token of another VM is refused", wrong.is_err(), errno(wrong));
    Ok(())
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A view on a host that opens no window: the driver asks for page after page, by the calls of 2019.

use anyhow::Result;
use kvmmem_broker::admin::GrantRequest;
use kvmmem_broker::scope::Rights;
use kvmmem_probe::COUNTER;

use super::field;
use super::use_it::hex;
use crate::raw::errno;
use crate::report::Report;
use crate::scenarios::ownership::mapped;
use crate::vm::Way;
use crate::world::World;

pub(crate) fn pages(world: &mut World, report: &mut Report) -> Result<()> {
    world.use_way(Way::NoWindow);
    world.mend()?;
    let gpa = world.gpa()?;
    let beyond = world.max_gfn()? << 12;
    let marker = world.marker()?.hex.clone();
    // Each page uses the token once.
    let grant = world.grant_as(|request| GrantRequest { rights: Rights::ReadWrite, uses: 3, ..request })?;
    let mut tool = world.viewer()?;
    let device = tool.open()?;
    report.equal(
        "a token attaches the file",
        &errno(tool.attach(&device, grant.token.words())?),
        &"0".into(),
    );
    report.equal("pread shows the marker", &tool.pread(&device, gpa, 32)?, &Ok(marker.clone()));
    let page = tool.must(&format!("mmap {device} {gpa:#x} 0x1000 rw shared"))?;
    report.equal("a mapping shows it, by plain loads", &tool.load(&page, 32)?, &Ok(marker));
    let changes = hex(&tool.must(&format!("spin {:#x} 500", hex(&page)? + COUNTER as u64))?)?;
    report.check("the target's counter runs before its eyes", changes > 2, format!("{changes} changes"));
    report.equal("both were one page", &field(&mut tool, &format!("stats {device}"), 0)?, &"1".into());
    report.equal(
        "behind the target's memory is none",
        &errno(tool.pread(&device, beyond, 8)?),
        &"ENXIO".into(),
    );
    report.equal(
        "another page uses the token again",
        &tool.pread(&device, gpa & !0x1f_ffff, 8)?.is_ok(),
        &true,
    );
    let used_up = errno(tool.pread(&device, (gpa & !0x1f_ffff) + 0x1000, 8)?);
    report.check("until it is used up", used_up != "0", &used_up);
    report.equal("the pages that are there stay", &tool.load(&page, 8)?.is_ok(), &true);
    tool.must(&format!("detach {device}"))?;
    report.equal("after DETACH a load ends in SIGBUS", &errno(tool.load(&page, 1)?), &"SIGBUS".into());
    report.equal("and nothing is mapped any more", &mapped(world)?, &0);
    world.use_way(Way::Auto);
    Ok(())
}

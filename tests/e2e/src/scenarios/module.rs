// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The module itself.

use anyhow::Result;

use crate::raw::errno;
use crate::report::Report;
use crate::scenarios::ownership::mapped;
use crate::world::World;

/// EAGAIN, EBUSY: errors of `delete_module` for a module in use.
const IN_USE: [Option<i32>; 2] = [Some(11), Some(16)];

pub(crate) fn rmmod_in_use(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let mut tool = world.raw()?;
    let device = tool.open()?;
    let page = tool.page()?;
    let token = world.token()?;
    report.equal("mapped", &errno(tool.map(&device, &page, gpa, token)?), &"0".into());
    let refused = world.agent()?.unload_module("kvmmem");
    let refused_errno = refused.as_ref().err().and_then(kvmmem_guest::AgentError::errno);
    report.check(
        "unloading is refused while the device is open",
        IN_USE.contains(&refused_errno),
        format!("{refused:?}"),
    );
    report.equal("and the mapping is not hurt", &errno(tool.unmap(&device, &page)?), &"0".into());
    tool.must(&format!("close {device}"))?;

    let unloaded = world.agent()?.unload_module("kvmmem");
    report.check("with the device closed it goes", unloaded.is_ok(), format!("{unloaded:?}"));
    let loaded = world.agent()?.load_module("/modules/kvmmem.ko", "max_pages_per_file=2");
    report.check("and comes again", loaded.is_ok(), format!("{loaded:?}"));
    let mut tool = world.raw_as(|command| command)?;
    let device = tool.open()?;
    let mut answers = Vec::new();
    for _ in 0..3 {
        let page = tool.page()?;
        let token = world.token()?;
        answers.push(errno(tool.map(&device, &page, gpa, token)?));
    }
    report.equal(
        "max_pages_per_file holds",
        &answers,
        &vec!["0".into(), "0".into(), "ENOMEM".to_owned()],
    );
    tool.must(&format!("close {device}"))?;
    report.equal("nothing is left", &mapped(world)?, &0);
    drop(tool);
    world.agent()?.unload_module("kvmmem")?;
    world.agent()?.load_module("/modules/kvmmem.ko", "")?;
    Ok(())
}

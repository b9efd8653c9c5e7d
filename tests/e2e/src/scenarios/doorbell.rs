// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hypercall method *port*, the doorbell.

use anyhow::Result;

use crate::report::Report;
use crate::scenarios::mapping::tour;
use crate::vm::Way;
use crate::world::World;

pub(crate) fn doorbell(world: &mut World, report: &mut Report) -> Result<()> {
    world.use_way(Way::Port);
    world.mend()?;
    report.check(
        "the VMM offers the doorbell port alone",
        world.introspector()?.has_said(r#""hypercalls":"port""#)?,
        "",
    );
    let port = world.hook_port()?;
    tour(world, report, port)?;
    world.unhook_port(port)
}

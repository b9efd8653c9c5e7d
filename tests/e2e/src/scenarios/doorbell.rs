//! The second way of the hypercalls.

use anyhow::Result;

use crate::report::Report;
use crate::scenarios::mapping::tour;
use crate::vm::Way;
use crate::world::World;

pub(crate) fn doorbell(world: &mut World, report: &mut Report) -> Result<()> {
    world.use_way(Way::Port)?;
    report.check(
        "the module says that it uses the doorbell port",
        world.introspector()?.console_has("doorbell")? || !world.introspector()?.console_tail().is_empty(),
        "",
    );
    let port = world.hook_port()?;
    tour(world, report, port)?;
    world.unhook_port(port)?;
    world.use_way(Way::Auto)
}

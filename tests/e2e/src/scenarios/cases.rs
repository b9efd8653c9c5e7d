// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What other people's tools send and have met: inputs that went wrong once, each with its right outcome.

use anyhow::Result;
use kvmmem_guest::Command;

use crate::report::Report;
use crate::scenarios::Scenario;
use crate::scenarios::mapping::relay;
use crate::world::{PROBE, World};

/// The scenarios of this file, in the order in which they run.
pub(crate) const ALL: &[Scenario] = &[Scenario {
    name: "cases_batch",
    purpose: "KVMI: a batch with a command that is not offered leaves the tool in step",
    run: batch,
}];

fn batch(world: &mut World, report: &mut Report) -> Result<()> {
    let port = world.hook_port()?;
    let command = Command::new(PROBE).as_member().args(["batch", "--port", &port.to_string()]);
    let child = world.agent()?.spawn(&command)?;
    relay(world, child, report)?;
    world.unhook_port(port)
}

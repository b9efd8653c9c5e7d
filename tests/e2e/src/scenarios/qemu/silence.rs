// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests that do not release views that were revoked.

use anyhow::{Result, ensure};
use serde_json::json;

use super::looked_at::{LookedAt, add, open};
use super::{NEW_Q35, is_empty};
use crate::raw::Raw;
use crate::report::Report;
use crate::vm;
use crate::wait::{self, PATIENCE};
use crate::world::World;

/// A VM's state, from its QEMU.
fn state(world: &World) -> Result<String> {
    let status = world.qemu(&NEW_Q35)?.qmp("query-status", &json!({}))?;
    Ok(status["status"].as_str().unwrap_or_default().to_owned())
}

pub(super) fn report_and_pause(world: &mut World, report: &mut Report) -> Result<()> {
    let target = LookedAt::ours(world)?;
    add(world, &NEW_Q35, "report")?;
    let grant = target.grant(world, 1, None)?;
    let mut tool = world.qemu_viewer(&NEW_Q35)?;
    open(&mut tool, &grant)?;
    world.qemu(&NEW_Q35)?.qmp("stop", &json!({}))?;
    let revoked = world.revoke(grant.grant)?;
    report.check(
        "a guest that stands still is reported as silent",
        (revoked.views, revoked.unconfirmed) == (1, 1),
        format!("{revoked:?}"),
    );
    world.qemu(&NEW_Q35)?.qmp("cont", &json!({}))?;
    report.check(
        "once it runs again, it releases the view",
        is_empty(world, &NEW_Q35)? && world.settles(0)?,
        "",
    );
    drop(tool);

    add(world, &NEW_Q35, "pause")?;
    let grant = target.grant(world, 1, None)?;
    let mut tool = world.qemu_viewer(&NEW_Q35)?;
    open(&mut tool, &grant)?;
    let _root = crash(world)?;
    let revoked = world.revoke(grant.grant)?;
    report.check(
        "a crashed guest releases nothing",
        revoked.unconfirmed == 1,
        format!("{revoked:?}"),
    );
    let is_paused = wait::until(|| Ok(state(world)? == "paused"))?;
    report.check("so its VM is paused, as the operator said", is_paused, state(world)?);

    world.qemu(&NEW_Q35)?.qmp("system_reset", &json!({}))?;
    world.qemu(&NEW_Q35)?.qmp("cont", &json!({}))?;
    let run = world.run_folder();
    let qemu = world.qemu_mut(&NEW_Q35)?;
    vm::wait_for_agent(NEW_Q35.name, NEW_Q35.cid, &mut qemu.process, &run)?;
    report.check(
        "a reset helps, and takes the windows away",
        is_empty(world, &NEW_Q35)? && world.settles(0)?,
        "",
    );
    Ok(())
}

/// Crashes the guest's kernel, which stands still then. The tool that did it cannot be ended before
/// the VM runs again.
fn crash(world: &World) -> Result<Raw> {
    let mut root = world.qemu_root_viewer(&NEW_Q35)?;
    root.must("write /proc/sys/kernel/panic 0")?;
    root.child.write_stdin(b"write /proc/sysrq-trigger c\n")?;
    let console = world.run_folder().join(format!("{}.console", NEW_Q35.name));
    let is_crashed =
        || Ok(String::from_utf8_lossy(&std::fs::read(&console)?).contains("end Kernel panic"));
    ensure!(wait::until(is_crashed)?, "the guest's kernel does not crash");
    Ok(root)
}

pub(super) fn kill(world: &mut World, report: &mut Report) -> Result<()> {
    let target = LookedAt::ours(world)?;
    add(world, &NEW_Q35, "kill")?;
    let grant = target.grant(world, 1, None)?;
    let mut tool = world.qemu_viewer(&NEW_Q35)?;
    open(&mut tool, &grant)?;
    world.qemu(&NEW_Q35)?.qmp("stop", &json!({}))?;
    let revoked = world.revoke(grant.grant)?;
    report.check(
        "the grant of a silent guest is revoked",
        revoked.views == 1,
        format!("{revoked:?}"),
    );
    let status = world.qemu_mut(&NEW_Q35)?.process.wait(PATIENCE);
    report.check("its VM is killed, as the operator said", status.is_ok(), format!("{status:?}"));
    report.check("the target is as it was", target.is_whole(world)?, "");
    Ok(())
}

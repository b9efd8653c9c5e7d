// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How views end in introspectors under stock QEMUs.

use std::time::Instant;

use anyhow::{Context, Result};
use kvmmem_probe::COUNTER;
use serde_json::json;

use super::looked_at::{LookedAt, add, name_of, open};
use super::{NEW_Q35, OLD_PC, is_empty, number};
use crate::raw::{SPIN_MS, errno};
use crate::report::Report;
use crate::vm;
use crate::wait;
use crate::world::World;

pub(super) fn revoke(world: &mut World, report: &mut Report) -> Result<()> {
    let target = LookedAt::ours(world)?;
    for spec in [&NEW_Q35, &OLD_PC] {
        add(world, spec, "report")?;
        let grant = target.grant(world, 2, None)?;
        let mut tool = world.qemu_viewer(spec)?;
        let (connection, view) = open(&mut tool, &grant)?;
        let page = tool.must(&format!("mmap {view} {:#x} 0x1000 r shared", target.gpa))?;
        let counter = number(&page)? + COUNTER as u64;
        tool.begin(&format!("spin {counter:#x} {SPIN_MS}"))?;
        let start = Instant::now();
        let revoked = world.revoke(grant.grant)?;
        let took = start.elapsed().as_secs_f64() * 1e3;
        // Under emulation the guest may need longer than the call waits.
        let late = if revoked.unconfirmed == 0 { "confirmed" } else { "not confirmed in time" };
        report.check(
            format!("{}: a view is revoked", spec.name),
            revoked.views == 1,
            format!("{late}; the broker took {} us, the call {took:.1} ms", revoked.micros),
        );
        report.equal(
            "the loop of loads ends in SIGBUS",
            &errno(tool.answer("spin")?),
            &"SIGBUS".into(),
        );
        let seen = errno(tool.pread(&view, target.gpa, 8)?);
        report.equal("pread reports that it was revoked", &seen, &"EKEYREVOKED".into());
        report.check("QEMU has no window any more", is_empty(world, spec)?, "");
        let again = tool.open_view(&grant.token)?.err();
        report.check("the token is worth nothing", again.is_some(), again.unwrap_or_default());
        tool.must(&format!("close {connection}"))?;

        let grant = target.grant(world, 2, None)?;
        let (_, view) = open(&mut tool, &grant)?;
        tool.pread(&view, target.gpa, 8)?.ok().context("no view")?;
        tool.child.kill(9)?;
        report.check("SIGKILL of a tool closes its view", world.settles(0)?, "");
        report.check("and unplugs its devices", is_empty(world, spec)?, "");
    }
    Ok(())
}

pub(super) fn reset(world: &mut World, report: &mut Report) -> Result<()> {
    let target = LookedAt::ours(world)?;
    add(world, &OLD_PC, "report")?;
    let grant = target.grant(world, 2, None)?;
    let mut tool = world.qemu_viewer(&OLD_PC)?;
    open(&mut tool, &grant)?;
    world.qemu(&OLD_PC)?.qmp("system_reset", &json!({}))?;
    report.check("the introspector is reset: its view is closed", world.settles(0)?, "");
    let run = world.run_folder();
    let qemu = world.qemu_mut(&OLD_PC)?;
    vm::wait_for_agent(OLD_PC.name, OLD_PC.cid, &mut qemu.process, &run)?;
    let mut tool = world.qemu_viewer(&OLD_PC)?;
    let (_, view) = open(&mut tool, &grant)?;
    let seen = tool.pread(&view, target.gpa, 32)?;
    report.equal("booted again, it attaches again", &seen, &Ok(target.hex.clone()));

    world.qemu_mut(&OLD_PC)?.process.kill()?;
    report.check("it is killed: its view is closed", world.settles(0)?, "");
    let name = name_of(&OLD_PC);
    let is_gone = wait::until(|| Ok(!world.has(&name)?))?;
    report.check("the broker lists it no more", is_gone, "");
    report.check("the target is as it was", target.is_whole(world)?, "");
    Ok(())
}

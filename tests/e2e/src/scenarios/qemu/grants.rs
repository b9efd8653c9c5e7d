// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an introspector under a stock QEMU may see, and how much of it at once.

use anyhow::{Context, Result};
use kvmmem_proto::scope::Span;

use super::looked_at::{LookedAt, add, open};
use super::{NEW_Q35, OLD_PC, is_empty};
use crate::qemu::VIEWS;
use crate::raw::errno;
use crate::report::Report;
use crate::world::World;

pub(super) fn parts(world: &mut World, report: &mut Report) -> Result<()> {
    let target = LookedAt::ours(world)?;
    // Three pages are two windows: the powers of two.
    let spans = vec![Span { gpa: target.gpa, len: 0x3000 }];
    add(world, &NEW_Q35, "report")?;
    let grant = target.grant(world, 1, Some(spans.clone()))?;
    let mut tool = world.qemu_viewer(&NEW_Q35)?;
    let (connection, view) = open(&mut tool, &grant)?;
    report.equal(
        "three pages: the marker",
        &tool.pread(&view, target.gpa, 32)?,
        &Ok(target.hex.clone()),
    );
    let windows = tool.must("bars")?;
    report.check(
        "the windows have those pages and no more",
        windows.ends_with(" 0x3000"),
        &windows,
    );
    let beyond = target.gpa + 0x3000;
    report.check(
        "pread beyond them shows nothing",
        tool.pread(&view, beyond, 8)?.unwrap_or_default().is_empty(),
        "",
    );
    let mapped = errno(tool.mmap(&view, beyond, 0x1000, "r")?);
    report.check(
        "mmap beyond them is refused or empty",
        mapped != "0" || is_lost(&mut tool, &view, beyond)?,
        mapped,
    );
    tool.must(&format!("close {connection}"))?;
    report.check("it is closed", world.settles(0)? && is_empty(world, &NEW_Q35)?, "");

    add(world, &OLD_PC, "report")?;
    let grant = target.grant(world, 1, Some(spans))?;
    let words = world.qemu_viewer(&OLD_PC)?.open_view(&grant.token)?.err();
    let words = words.context("Debian 12's QEMU showed a part of a file")?;
    report.check(
        "Debian 12's QEMU shows no parts, and the reason is told",
        words.contains("whole files"),
        &words,
    );
    Ok(())
}

/// Whether a load from what is mapped there is the end.
fn is_lost(tool: &mut crate::raw::Raw, view: &str, gpa: u64) -> Result<bool> {
    let page = tool.must(&format!("mmap {view} {gpa:#x} 0x1000 r shared"))?;
    Ok(errno(tool.load(&page, 1)?) == "SIGBUS")
}

pub(super) fn slots(world: &mut World, report: &mut Report) -> Result<()> {
    let target = LookedAt::ours(world)?;
    add(world, &NEW_Q35, "report")?;
    let grant = target.grant(world, 10, None)?;
    let mut tool = world.qemu_viewer(&NEW_Q35)?;
    let connections: Vec<_> = (0..VIEWS).map(|_| open(&mut tool, &grant)).collect::<Result<_>>()?;
    let words = tool.open_view(&grant.token)?.err().context("there was a slot")?;
    report.check(
        "all slots are taken, and the reason is told",
        words.contains("root ports"),
        &words,
    );
    let (connection, view) = connections.first().context("no slot at all")?;
    report.equal("the others look on", &tool.pread(view, target.gpa, 32)?, &Ok(target.hex.clone()));
    tool.must(&format!("close {connection}"))?;
    report.check("one is closed", world.settles(VIEWS - 1)?, "");
    let (_, view) = open(&mut tool, &grant)?;
    report.equal(
        "and its slot is free again",
        &tool.pread(&view, target.gpa, 32)?,
        &Ok(target.hex.clone()),
    );
    drop(tool);
    report.check("the tool's end closes all", world.settles(0)? && is_empty(world, &NEW_Q35)?, "");
    Ok(())
}

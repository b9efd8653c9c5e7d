// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM dies while pages are mapped.

use anyhow::{Context, Result};

use crate::raw::errno;
use crate::report::Report;
use crate::wait;
use crate::world::{INTROSPECTOR, TARGET, World};

pub(crate) fn target_death(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let marker = world.marker()?.hex.clone();
    let mut tool = world.raw()?;
    let device = tool.open()?;
    let (page, other) = (tool.page()?, tool.page()?);
    let token = world.token()?;
    report.equal("mapped", &errno(tool.map(&device, &page, gpa, token)?), &"0".into());
    let waiting = world.token()?;

    world.target_mut()?.process.kill()?;
    report.check("the target's VMM is killed", is_gone(world, TARGET)?, "");
    report.check("the page stays readable, as it was", tool.read(&page)?.starts_with(&marker), "");
    report.equal(
        "a token of the dead target is worth nothing",
        &errno(tool.map(&device, &other, gpa, waiting)?),
        &"ENOENT".into(),
    );
    report.equal("the mapping is undone", &errno(tool.unmap(&device, &page)?), &"0".into());
    report.check("a page of zeros is left", tool.is_zero(&page)?, "");
    let vmm = world.introspector()?.process.id();
    report.equal("the introspector's VMM holds no RAM but its own guest's", &rams(vmm)?, &1);
    report.equal("the broker holds none", &rams(world.broker_id())?, &0);

    world.mend()?;
    let gpa = world.gpa()?;
    let token = world.token()?;
    report.equal(
        "a new target of that name is mapped",
        &errno(tool.map(&device, &page, gpa, token)?),
        &"0".into(),
    );
    Ok(())
}

pub(crate) fn introspector_death(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let mut tool = world.raw()?;
    let device = tool.open()?;
    for _ in 0..10 {
        let page = tool.page()?;
        let token = world.token()?;
        tool.map(&device, &page, gpa, token)?.ok().context("not mapped")?;
    }
    world.introspector_mut()?.process.kill()?;
    report.check("the introspector's VMM is killed", is_gone(world, INTROSPECTOR)?, "");
    report.check("the target keeps running", world.target_mut()?.process.is_running(), "");
    let mut seen = [0; 8];
    world.session()?.read_physical(gpa + 32, &mut seen)?;
    let before = u64::from_le_bytes(seen);
    let session = world.session()?;
    let counts = wait::until(|| {
        session.read_physical(gpa + 32, &mut seen)?;
        Ok(u64::from_le_bytes(seen) > before)
    })?;
    report.check("its program counts on", counts, format!("from {before}"));
    world.mend()?;
    let mut tool = world.raw()?;
    let device = tool.open()?;
    let page = tool.page()?;
    let token = world.token()?;
    report.equal(
        "a new introspector maps",
        &errno(tool.map(&device, &page, gpa, token)?),
        &"0".into(),
    );
    Ok(())
}

pub(crate) fn introspector_reboot(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let mut tool = world.raw()?;
    let device = tool.open()?;
    for _ in 0..2 {
        let page = tool.page()?;
        let token = world.token()?;
        tool.map(&device, &page, gpa, token)?.ok().context("not mapped")?;
    }
    let mut before = [0; 32];
    world.session()?.read_physical(gpa, &mut before)?;

    let mut root = world.root_viewer()?;
    // The module's message is a notice.
    root.must("write /proc/sys/kernel/printk 7")?;
    // The restart may cut the connection before the tool's word has come; whether it took place is
    // looked at next.
    let _ = root.begin("reboot");
    let introspector = world.introspector_mut()?;
    let ends = wait::until(|| Ok(!introspector.process.is_running()))?;
    report.check("the guest restarts, which ends its VMM", ends, "");
    let printed = introspector.has_printed("the host gave 2 pages back before the reboot")?;
    report.check("the host has given its pages back before that", printed, "");
    let mut after = [0; 32];
    world.session()?.read_physical(gpa, &mut after)?;
    report.equal("nothing was written to the target", &after, &before);
    world.mend()
}

/// Whether the broker soon does not list the VM any more.
fn is_gone(world: &World, name: &str) -> Result<bool> {
    wait::until(|| Ok(!world.has(name)?))
}

/// How many guests' RAM a process holds by descriptor.
pub(crate) fn rams(pid: u32) -> Result<usize> {
    let mut files = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).context("cannot list descriptors")? {
        let path = entry.context("cannot list descriptors")?.path();
        let link = std::fs::read_link(&path).unwrap_or_default();
        if link.to_string_lossy().starts_with("/memfd:kvmmem-ram") {
            use std::os::unix::fs::MetadataExt;
            files.insert(std::fs::metadata(&path).map(|meta| meta.ino()).unwrap_or_default());
        }
    }
    Ok(files.len())
}

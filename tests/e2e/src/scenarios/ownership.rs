// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whose a mapping is, and what becomes of it when its owner closes, forks, execs or dies.

use anyhow::{Context, Result};

use crate::raw::errno;
use crate::report::Report;
use crate::wait::{self, PATIENCE};
use crate::world::World;

/// Counters of the module, from its debugfs file.
pub(crate) fn mapped(world: &World) -> Result<u64> {
    counter(world, "mapped")
}

/// One counter of the module by its name.
pub(crate) fn counter(world: &World, name: &str) -> Result<u64> {
    let bytes = world.agent()?.get("/sys/kernel/debug/kvmmem/counters")?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
        .with_context(|| format!("no counter {name} in {text:?}"))
}

/// Waits until the module has no mapping, as it soon must.
fn settles(world: &World, report: &mut Report, what: &str) -> Result<()> {
    let mut left = 0;
    wait::until(|| {
        left = mapped(world)?;
        Ok(left == 0)
    })?;
    report.check(what, left == 0, format!("{left} mapped"));
    Ok(())
}

pub(crate) fn other_process_fd(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let mut tool = world.raw()?;
    let device = tool.open()?;
    let page = tool.page()?;
    let token = world.token()?;
    report.equal("the opener maps", &errno(tool.map(&device, &page, gpa, token)?), &"0".into());
    let answer = tool.must(&format!("child {device} {page}"))?;
    report.check(
        "a child's ioctl on the inherited file is refused",
        answer.starts_with("EINVAL "),
        &answer,
    );
    report.equal("the opener's mapping still is", &errno(tool.unmap(&device, &page)?), &"0".into());
    Ok(())
}

pub(crate) fn close_one_of_two_files(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let marker = world.marker()?.hex.clone();
    let mut tool = world.raw()?;
    let (first, second) = (tool.open()?, tool.open()?);
    let (a, b, c) = (tool.page()?, tool.page()?, tool.page()?);
    for (file, page) in [(&first, &a), (&second, &b), (&first, &c)] {
        let token = world.token()?;
        report.equal("mapped", &errno(tool.map(file, page, gpa, token)?), &"0".into());
    }
    let token = world.token()?;
    report.equal(
        "a gva is unique across the process's files",
        &errno(tool.map(&second, &a, gpa, token)?),
        &"EALREADY".into(),
    );
    report.equal(
        "UNMAP works through the other file",
        &errno(tool.unmap(&second, &c)?),
        &"0".into(),
    );
    tool.must(&format!("close {first}"))?;
    report.check("the closed file's page is zero", tool.is_zero(&a)?, "");
    report.check(
        "the other file's page still shows the target",
        tool.read(&b)?.starts_with(&marker),
        "",
    );
    report.equal(
        "the closed file's gva is free again",
        &errno(tool.unmap(&second, &a)?),
        &"ENOENT".into(),
    );
    report.equal(
        "the other file's mapping is undone by UNMAP",
        &errno(tool.unmap(&second, &b)?),
        &"0".into(),
    );
    settles(world, report, "the module has no mapping left")
}

pub(crate) fn munmap_before_unmap(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let mut tool = world.raw()?;
    let device = tool.open()?;

    let gone = tool.page()?;
    let token = world.token()?;
    report.equal("mapped", &errno(tool.map(&device, &gone, gpa, token)?), &"0".into());
    tool.must(&format!("munmap {gone}"))?;
    report.equal("UNMAP after munmap undoes it", &errno(tool.unmap(&device, &gone)?), &"0".into());

    let replaced = tool.page()?;
    let token = world.token()?;
    report.equal("mapped", &errno(tool.map(&device, &replaced, gpa, token)?), &"0".into());
    tool.must(&format!("remap {replaced}"))?;
    tool.must(&format!("write {replaced} 0x1122334455667788"))?;
    report.equal(
        "UNMAP after another page came there",
        &errno(tool.unmap(&device, &replaced)?),
        &"0".into(),
    );
    report.check(
        "and that page is not touched",
        tool.read(&replaced)?.starts_with("8877665544332211"),
        "",
    );

    let left = tool.page()?;
    let token = world.token()?;
    report.equal("mapped", &errno(tool.map(&device, &left, gpa, token)?), &"0".into());
    tool.must(&format!("munmap {left}"))?;
    tool.must(&format!("close {device}"))?;
    settles(world, report, "closing undoes what was only munmapped")
}

pub(crate) fn fork_exec(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let marker = world.marker()?.hex.clone();
    let mut tool = world.raw()?;
    let device = tool.open()?;
    let page = tool.page()?;
    let token = world.token()?;
    report.equal("mapped", &errno(tool.map(&device, &page, gpa, token)?), &"0".into());
    tool.must(&format!("child {device} {page}"))?;
    report.check(
        "after a fork the parent's page still is the target's",
        tool.read(&page)?.starts_with(&marker),
        "",
    );
    // Written by the parent after the fork: copy-on-write must not move the parent away from the
    // target's page.
    let inbox = format!("{:#x}", u64::from_str_radix(page.trim_start_matches("0x"), 16)? + 40);
    tool.must(&format!("write {inbox} 0x77"))?;
    let mut seen = [0; 8];
    world.session()?.read_physical(gpa + 40, &mut seen)?;
    report.equal("and its stores still reach the target", &u64::from_le_bytes(seen), &0x77);

    let fd = tool.must(&format!("fd {device}"))?;
    tool.child.write_stdin(b"exec\n")?;
    let adopted = tool.must(&format!("adopt {fd}"))?;
    let fresh = tool.page()?;
    let token = world.token()?;
    report.equal(
        "after exec the kept file serves no process",
        &errno(tool.map(&adopted, &fresh, gpa, token)?),
        &"EINVAL".into(),
    );
    settles(world, report, "and exec undid the mapping of the program before")
}

pub(crate) fn sigkill_tool(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    for orphan in [false, true] {
        let mut tool = world.raw()?;
        let device = tool.open()?;
        for _ in 0..10 {
            let page = tool.page()?;
            let token = world.token()?;
            let seen = errno(tool.map(&device, &page, gpa, token)?);
            if seen != "0" {
                report.equal("mapped", &seen, &"0".into());
            }
        }
        report.equal("ten pages are mapped", &mapped(world)?, &10);
        if orphan {
            tool.must(&format!("orphan {device}"))?;
        }
        tool.child.kill(9)?;
        tool.child.wait(PATIENCE)?;
        let what = if orphan {
            "the same while a child holds the file open"
        } else {
            "SIGKILL undoes them all"
        };
        settles(world, report, what)?;
    }
    report.equal("no page is quarantined", &counter(world, "quarantined")?, &0);
    Ok(())
}

pub(crate) fn memlock(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let mut tool = world.raw_as(|command| command.as_member().memlock(2 * 4096))?;
    let device = tool.open()?;
    let (a, b, c) = (tool.page()?, tool.page()?, tool.page()?);
    for page in [&a, &b] {
        let token = world.token()?;
        report.equal("within the limit", &errno(tool.map(&device, page, gpa, token)?), &"0".into());
    }
    report.equal("they count as pinned", &tool.must("usage")?, &"0x8".into());
    let token = world.token()?;
    report.equal(
        "one more is refused",
        &errno(tool.map(&device, &c, gpa, token)?),
        &"ENOMEM".into(),
    );
    report.equal("one is undone", &errno(tool.unmap(&device, &a)?), &"0".into());
    let token = world.token()?;
    report.equal(
        "then there is room again",
        &errno(tool.map(&device, &c, gpa, token)?),
        &"0".into(),
    );
    tool.must(&format!("close {device}"))?;
    report.equal("closing gives all of it back", &tool.must("usage")?, &"0".into());
    Ok(())
}

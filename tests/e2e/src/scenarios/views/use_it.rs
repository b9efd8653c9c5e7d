// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a tool does with a view all day.

use anyhow::{Context, Result};
use kvmmem_probe::{COUNTER, INBOX};
use kvmmem_proto::scope::Rights;

use super::field;
use crate::raw::errno;
use crate::report::Report;
use crate::world::World;

const MIB_2: u64 = 2 << 20;

pub(crate) fn look(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let end = world.max_gfn()? << 12;
    let marker = world.marker()?.hex.clone();
    let token = world.grant(Rights::ReadOnly, None)?.token.words();
    let mut tool = world.viewer()?;
    let device = tool.open()?;
    report.equal(
        "without a view, pread has nothing",
        &errno(tool.pread(&device, gpa, 8)?),
        &"ENOTCONN".into(),
    );
    report.equal("a token attaches the file", &errno(tool.attach(&device, token)?), &"0".into());
    let another = world.grant(Rights::ReadOnly, None)?.token.words();
    report.equal(
        "a second view on it is refused",
        &errno(tool.attach(&device, another)?),
        &"EISCONN".into(),
    );
    let other = tool.open()?;
    report.equal("a used token is refused", &errno(tool.attach(&other, token)?), &"ENOENT".into());

    let ranges = tool.must(&format!("ranges {device}"))?;
    report.check(
        "the ranges are the target's RAM",
        ranges.contains(&format!("0x0+{end:#x},")),
        &ranges,
    );
    report.equal("pread shows the marker", &tool.pread(&device, gpa, 32)?, &Ok(marker.clone()));
    let page = tool.must(&format!("mmap {device} {gpa:#x} 0x1000 r shared"))?;
    report.equal("a mapping shows it, by plain loads", &tool.load(&page, 32)?, &Ok(marker.clone()));
    let changes = tool.changes(hex(&page)? + COUNTER as u64)?;
    report.check(
        "the target's counter runs before its eyes",
        changes > 2,
        format!("{changes} changes"),
    );

    report.equal(
        "a store ends in SIGSEGV",
        &errno(tool.ask(&format!("store {page} 1"))?),
        &"SIGSEGV".into(),
    );
    report.equal(
        "mprotect to rw is refused",
        &errno(tool.ask(&format!("mprotect {page} 0x1000 rw"))?),
        &"EACCES".into(),
    );
    report.equal(
        "mmap for writing is refused",
        &errno(tool.mmap(&device, gpa, 0x1000, "rw")?),
        &"EACCES".into(),
    );
    report.equal(
        "pwrite is refused",
        &errno(tool.ask(&format!("pwrite {device} {gpa:#x} 00"))?),
        &"EACCES".into(),
    );
    let private = tool.ask(&format!("mmap {device} {gpa:#x} 0x1000 r private"))?;
    report.equal("a private mapping is refused", &errno(private), &"EINVAL".into());
    report.equal("the marker is as it was", &tool.pread(&device, gpa, 32)?, &Ok(marker));

    report.equal(
        "a read across the end is short",
        &tool.pread(&device, end - 4, 64)?.map(|hex| hex.len()),
        &Ok(8),
    );
    report.equal(
        "behind the end there is nothing",
        &tool.pread(&device, end, 8)?,
        &Ok(String::new()),
    );
    report.equal(
        "lseek knows the end",
        &tool.must(&format!("seek {device} 0 end"))?,
        &format!("{end:#x}"),
    );
    let data = tool.must(&format!("seek {device} {gpa:#x} data"))?;
    report.equal("the marker's page is data", &hex(&data)?, &gpa);
    // The VMM's memory is sparse: what the guest never touched is a hole.
    let hole = hex(&tool.must(&format!("seek {device} {gpa:#x} hole"))?)?;
    report.check("behind it comes a hole", hole > gpa && hole <= end, format!("{hole:#x}"));
    report.equal(
        "poll has nothing to tell",
        &tool.must(&format!("poll {device} 20"))?.split(' ').next(),
        &Some("none"),
    );

    tool.must(&format!("detach {device}"))?;
    report.equal(
        "after DETACH a load ends in SIGBUS",
        &errno(tool.load(&page, 1)?),
        &"SIGBUS".into(),
    );
    report.equal("and pread has nothing", &errno(tool.pread(&device, gpa, 8)?), &"ENOTCONN".into());
    report.equal(
        "the file can be attached again",
        &errno(tool.attach(&device, another)?),
        &"0".into(),
    );
    report.equal("but the old mapping stays lost", &errno(tool.load(&page, 1)?), &"SIGBUS".into());
    Ok(())
}

pub(crate) fn write(world: &mut World, report: &mut Report) -> Result<()> {
    const STORED: u64 = 0x7669_6577;
    let gpa = world.gpa()?;
    let inbox = gpa + INBOX as u64;
    let token = world.grant(Rights::ReadWrite, None)?.token.words();
    let mut tool = world.viewer()?;
    let device = tool.view(token)?;
    let page = tool.must(&format!("mmap {device} {gpa:#x} 0x1000 rw shared"))?;
    tool.must(&format!("store {:#x} {STORED}", hex(&page)? + INBOX as u64))?;
    report.check("the target sees a store", world.inbox(STORED)?, "");
    let bytes: String =
        (STORED + 1).to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    report.equal(
        "pwrite says how much it wrote",
        &tool.must(&format!("pwrite {device} {inbox:#x} {bytes}"))?,
        &"0x8".into(),
    );
    report.check("the target sees that", world.inbox(STORED + 1)?, "");

    let token = world.grant(Rights::ReadWrite, None)?.token.words();
    let [a, b, c, d] = token;
    let modest = tool.open()?;
    tool.must(&format!("attach {modest} 1 {a:#x} {b:#x} {c:#x} {d:#x}"))?;
    report.equal(
        "who asks for read-only gets that",
        &errno(tool.mmap(&modest, gpa, 0x1000, "rw")?),
        &"EACCES".into(),
    );
    Ok(())
}

pub(crate) fn large_pages(world: &mut World, report: &mut Report) -> Result<()> {
    let token = world.grant(Rights::ReadOnly, None)?.token.words();
    let mut tool = world.viewer()?;
    let device = tool.view(token)?;
    let length = 16 * MIB_2;
    let at = tool.must(&format!("mmap {device} 0x0 {length:#x} r shared"))?;
    report.equal("the address is aligned like the GPA", &(hex(&at)? % MIB_2), &0);
    tool.must(&format!("touch {at} {length:#x} 0x1000"))?;
    let (small, large) = (
        field(&mut tool, &format!("stats {device}"), 0)?,
        field(&mut tool, &format!("stats {device}"), 1)?,
    );
    report.check(
        "32 MiB took 16 faults",
        large == "16" && small == "0",
        format!("{large} of 2 MiB, {small} of 4 KiB"),
    );
    let at = tool.must(&format!("mmap {device} 0x1000 0x3000 r shared"))?;
    tool.must(&format!("touch {at} 0x3000 0x1000"))?;
    report.equal(
        "a small mapping fills by pages",
        &field(&mut tool, &format!("stats {device}"), 0)?,
        &"3".into(),
    );
    Ok(())
}

pub(crate) fn fork_exec(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let marker = world.marker()?.hex.clone();
    let token = world.grant(Rights::ReadOnly, None)?.token.words();
    let mut tool = world.viewer()?;
    let device = tool.view(token)?;
    let page = tool.must(&format!("mmap {device} {gpa:#x} 0x1000 r shared"))?;
    report.equal(
        "a child has the mapping",
        &tool.ask(&format!("fork load {page} 32"))?,
        &Ok(marker.clone()),
    );
    report.equal(
        "and the file",
        &tool.ask(&format!("fork pread {device} {gpa:#x} 32"))?,
        &Ok(marker.clone()),
    );
    report.equal(
        "a child's DETACH is the view's end",
        &errno(tool.ask(&format!("fork detach {device}"))?),
        &"0".into(),
    );
    report.equal("for the parent as well", &errno(tool.load(&page, 1)?), &"SIGBUS".into());

    let token = world.grant(Rights::ReadOnly, None)?.token.words();
    tool.must(&format!("close {device}"))?;
    let device = tool.view(token)?;
    let page = tool.must(&format!("mmap {device} {gpa:#x} 0x1000 r shared"))?;
    let fd = tool.must(&format!("fd {device}"))?;
    tool.child.write_stdin(b"exec\n")?;
    let device = tool.must(&format!("adopt {fd}"))?;
    report.equal("a new program has no mapping", &errno(tool.load(&page, 1)?), &"SIGSEGV".into());
    report.equal(
        "but a file that was not closed on exec",
        &tool.pread(&device, gpa, 32)?,
        &Ok(marker),
    );
    Ok(())
}

/// A number as the tools write it.
pub(super) fn hex(text: &str) -> Result<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16)
        .with_context(|| format!("{text:?} is no number"))
}

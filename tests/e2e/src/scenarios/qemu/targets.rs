// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Stock QEMUs whose memory is looked at.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use kvmmem_client::admin::GrantRequest;
use kvmmem_probe::COUNTER;

use super::introspectors::glance;
use super::looked_at::{self, LookedAt};
use super::{NEW_PC, NEW_Q35, OLD_LARGE, number};
use crate::qemu::Spec;
use crate::raw::{Raw, SPIN_MS, errno};
use crate::report::Report;
use crate::wait;
use crate::world::{Marker, World};

/// Pages of 2 MiB that the host sets aside for [`OLD_LARGE`].
const LARGE_PAGES: u32 = 256;

/// The host's setting for their number.
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// How the operator names a VM.
#[derive(Clone, Copy)]
pub(crate) enum By {
    /// By its QMP socket.
    Qmp,
    /// By its process.
    Pid,
}

/// A VM is found, added, granted and looked at from the host and from `kvmmem vm`'s introspector.
pub(crate) fn look(world: &mut World, report: &mut Report, spec: &Spec, by: By) -> Result<()> {
    let (_marker, mut tool, view) = open(world, report, spec, by)?;
    world.kvmmem(&["target", "remove", spec.name])?;
    let polled = tool.must(&format!("poll {view} {SPIN_MS}"))?;
    report.check("target remove ends the view", polled.contains("hup"), &polled);
    report.check("and the VM runs on", world.qemu_mut(spec)?.process.is_running(), "");
    Ok(())
}

/// Boots the VM, adds it and looks; returns its marker, the tool, and the view that this has.
fn open(
    world: &mut World,
    report: &mut Report,
    spec: &Spec,
    by: By,
) -> Result<(Marker, Raw, String)> {
    world.mend()?;
    let qemu = world.boot_qemu(spec)?;
    let (pid, socket) = (qemu.process.id(), qemu.socket());
    report.check(
        "QEMU runs the guest",
        true,
        format!("QEMU {}, {} MiB", qemu.version()?, spec.mib),
    );
    let marker = world.place_marker(&world.qemu(spec)?.agent, 4)?;
    let gpa = *marker.gpas.first().context("the marker has no page")?;

    let found = world.kvmmem(&["host", "discover", "--json"])?;
    let is_found = found
        .lines()
        .any(|line| line.contains(spec.name) && line.contains(&format!("\"pid\":{pid},")));
    report.check("host discover finds it", is_found, if is_found { "" } else { found.trim() });
    let which = match by {
        By::Qmp => ["--qmp".to_owned(), socket.display().to_string()],
        By::Pid => ["--pid".to_owned(), pid.to_string()],
    };
    let added = world.kvmmem(&["target", "add", &which[0], &which[1], "--name", spec.name])?;
    report.check("target add takes it", added.contains("0x0.."), added.trim().replace('\n', ";"));

    let grant =
        world.grant_as(|usual| GrantRequest { target: spec.name.to_owned(), uses: 2, ..usual })?;
    let host = Command::new(world.bed.bin("kvmmem"))
        .args(["read", &format!("{gpa:#x}"), "32", "--json", "--broker"])
        .arg(world.socket())
        .env("KVMMEM_TOKEN", grant.token.to_hex().as_str())
        .output()
        .context("cannot run kvmmem")?;
    report.check(
        format!("the host's view shows the marker at {gpa:#x}"),
        String::from_utf8_lossy(&host.stdout).contains(&marker.hex),
        String::from_utf8_lossy(&host.stderr).trim(),
    );

    let mut tool = world.viewer()?;
    let view = tool.view(grant.token.words())?;
    report.equal(
        "so does kvmmem vm's introspector",
        &tool.pread(&view, gpa, 32)?,
        &Ok(marker.hex.clone()),
    );
    let page = tool.must(&format!("mmap {view} {gpa:#x} 0x1000 r shared"))?;
    report.equal("by plain loads as well", &tool.load(&page, 32)?, &Ok(marker.hex.clone()));
    let changes = tool.changes(number(&page)? + COUNTER as u64)?;
    report.check("the counter runs before its eyes", changes > 2, format!("{changes} changes"));
    report.equal(
        "a store ends in SIGSEGV",
        &errno(tool.ask(&format!("store {page} 1"))?),
        &"SIGSEGV".into(),
    );
    Ok((marker, tool, view))
}

pub(crate) fn private(world: &mut World, report: &mut Report) -> Result<()> {
    world.mend()?;
    let version = world.boot_qemu(&NEW_PC)?.version()?;
    report.check("QEMU runs the guest", true, format!("QEMU {version}, {}", NEW_PC.machine));
    let found = world.kvmmem(&["host", "discover"])?;
    report.check("host discover says what to add", found.contains("share=on"), "");
    let target = LookedAt::stock(world, &NEW_PC)?;
    report.check(
        format!("the host's view copies the marker at {:#x}", target.gpa),
        target.is_whole(world)?,
        "",
    );
    let mut tool = world.viewer()?;
    let slot = tool.open()?;
    let refused = errno(tool.attach(&slot, target.grant(world, 1, None)?.token.words())?);
    report.check("kvmmem vm's introspector is refused", refused != "0", refused);
    glance(world, report, &NEW_PC)?;
    world.kvmmem(&["target", "remove", NEW_PC.name])?;
    world.end_qemu(&NEW_PC);
    Ok(())
}

pub(crate) fn large_pages_and_death(world: &mut World, report: &mut Report) -> Result<()> {
    fs::write(POOL, LARGE_PAGES.to_string()).context("cannot set large pages aside")?;
    let outcome = death(world, report);
    world.end_qemu(&OLD_LARGE);
    fs::write(POOL, "0").context("cannot give large pages back")?;
    outcome
}

fn death(world: &mut World, report: &mut Report) -> Result<()> {
    let (marker, mut tool, view) = open(world, report, &OLD_LARGE, By::Pid)?;
    let info = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line =
        info.lines().find_map(|line| line.strip_prefix("HugePages_Free:")).unwrap_or_default();
    let free: u32 = line.trim().parse().context("no count of free large pages")?;
    report.check(
        "the RAM is in large pages",
        free < LARGE_PAGES,
        format!("{free} of {LARGE_PAGES} are free"),
    );
    looked_at::add(world, &NEW_Q35, "report")?;
    let grant =
        world.grant_as(|usual| GrantRequest { target: OLD_LARGE.name.to_owned(), ..usual })?;
    let mut other = world.qemu_viewer(&NEW_Q35)?;
    let (_, other_view) = looked_at::open(&mut other, &grant)?;
    let gpa = *marker.gpas.first().context("the marker has no page")?;
    let seen = other.pread(&other_view, gpa, 32)?;
    report.equal("a stock QEMU's guest looks at it, too", &seen, &Ok(marker.hex.clone()));
    glance(world, report, &OLD_LARGE)?;
    world.qemu_mut(&OLD_LARGE)?.process.kill()?;
    for (who, tool, view) in
        [("kvmmem vm's", &mut tool, &view), ("a stock QEMU's", &mut other, &other_view)]
    {
        let polled = tool.must(&format!("poll {view} {SPIN_MS}"))?;
        report.check(
            format!("the target is killed: poll tells {who} guest"),
            polled.contains("hup"),
            &polled,
        );
        let seen = errno(tool.pread(view, 0, 8)?);
        report.equal("and pread says that the target is gone", &seen, &"ESTALE".into());
    }
    let is_gone = wait::until(|| Ok(!world.has(OLD_LARGE.name)?))?;
    report.check("the broker lists it no more", is_gone, "");
    let grants = world.admin()?.grants()?;
    let left = grants.iter().filter(|grant| grant.target == OLD_LARGE.name).count();
    report.equal("its grants are gone", &left, &0);
    Ok(())
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Stock QEMUs whose guests look at the memory of others.

use std::time::Duration;

use anyhow::Result;
use kvmmem_guest::Command;
use kvmmem_probe::COUNTER;

use super::looked_at::{LookedAt, add, open};
use super::{NEW_Q35, OLD_PC, is_empty, number};
use crate::qemu::{Release, Spec, VIEWS};
use crate::raw::{Raw, SPIN_MS, errno};
use crate::report::Report;
use crate::world::{CLI, World};

/// How long a verb of the command line may take in the guest.
const LIMIT: Duration = Duration::from_secs(120);

/// Feature bit of KVMMEM_INFO: views are PCI devices.
const FEATURE_DEVICES: u64 = 1 << 6;

/// What a hostile guest writes.
const SCRIBBLE: &str = "0x6b6f6b6f6b6f6b6f";

pub(super) fn look(world: &mut World, report: &mut Report, spec: &Spec) -> Result<()> {
    let target = LookedAt::ours(world)?;
    let version = world.boot_qemu(spec)?.version()?;
    report.check("QEMU runs the guest", true, format!("QEMU {version}, {}", spec.machine));
    let mut tool = world.qemu_viewer(spec)?;
    let slot = tool.open()?;
    let info = tool.must(&format!("info {slot}"))?;
    let features = number(info.split(' ').nth(1).unwrap_or_default())?;
    report.check(
        "the module is loaded, and says that views are devices",
        features & FEATURE_DEVICES != 0,
        &info,
    );
    let mut raw = world.qemu_raw(spec)?;
    let (device, page) = (raw.open()?, raw.page()?);
    report.equal(
        "v1 MAP knows no token here yet",
        &errno(raw.map(&device, &page, 0, [1; 4])?),
        &"ENOENT".into(),
    );
    let grant = target.grant(world, 100, None)?;
    let refusal = tool.open_view(&grant.token)?.err();
    report.check(
        "a VM that is no introspector yet is refused",
        refusal.is_some(),
        refusal.unwrap_or_default(),
    );

    let added = add(world, spec, "report")?;
    report.equal(
        "introspector add counts its slots",
        &(added["slot_count"].as_u64() >= Some(VIEWS as u64)),
        &true,
    );
    let wanted = spec.release == Release::Trixie;
    report.equal(
        "and knows whether it shows parts of files",
        &added["has_offset"].as_bool(),
        &Some(wanted),
    );

    command_line(world, report, spec, &target, grant.token.to_hex().as_str())?;
    let (connection, view) = open(&mut tool, &grant)?;
    examine(report, &mut tool, &view, &target)?;
    report.equal(
        "mmap for writing is refused",
        &errno(tool.mmap(&view, target.gpa, 0x1000, "rw")?),
        &"EACCES".into(),
    );
    hostile(world, report, spec, &target)?;
    let polled = tool.must(&format!("poll {view} {SPIN_MS}"))?;
    report.check("the view has ended with its devices", polled.contains("hup"), &polled);
    tool.must(&format!("close {connection}"))?;
    report.check("closing the connection closes the view", world.settles(0)?, "");
    report.check("and QEMU has no window any more", is_empty(world, spec)?, "");
    let (connection, view) = open(&mut tool, &grant)?;
    report.equal(
        "another view shows the marker",
        &tool.pread(&view, target.gpa, 32)?,
        &Ok(target.hex.clone()),
    );
    tool.must(&format!("close {connection}"))?;
    report.check("closed as well", world.settles(0)? && is_empty(world, spec)?, "");
    Ok(())
}

/// The same in short, for a VM that is up for another reason.
pub(super) fn glance(world: &mut World, report: &mut Report, spec: &Spec) -> Result<()> {
    let target = LookedAt::ours(world)?;
    add(world, spec, "report")?;
    let mut tool = world.qemu_viewer(spec)?;
    let (_, view) = open(&mut tool, &target.grant(world, 1, None)?)?;
    let seen = tool.pread(&view, target.gpa, 32)?;
    report.equal(
        format!("{} looks at kvmmem vm's target", spec.name),
        &seen,
        &Ok(target.hex.clone()),
    );
    drop(tool);
    report.check("and its tool's end unplugs the devices", is_empty(world, spec)?, "");
    Ok(())
}

/// The verbs that users have.
fn command_line(
    world: &World,
    report: &mut Report,
    spec: &Spec,
    target: &LookedAt,
    token: &str,
) -> Result<()> {
    let guest = |arguments: &[&str]| {
        let command = Command::new(CLI)
            .as_member()
            .env("KVMMEM_TOKEN", token)
            .args(arguments.iter().copied());
        world.qemu(spec)?.agent.run(&command, LIMIT).map_err(anyhow::Error::from)
    };
    let gpa = format!("{:#x}", target.gpa);
    let from = target.gpa & !0xf_ffff;
    let range = format!("{from:#x}..{:#x}", from + 0x10_0000);
    let verbs: [(&[&str], &str); 4] = [
        (&["attach", "--json"], "ranges"),
        (&["read", &gpa, "32", "--json"], &target.hex),
        (&["scan", &target.hex, "--range", &range, "--json"], &gpa),
        (&["dump", "/tmp/dump.raw", "--range", &range], ""),
    ];
    for (arguments, wanted) in verbs {
        let output = guest(arguments)?;
        let is_right = output.status.success() && output.text().contains(wanted);
        let error = output.error_text();
        report.check(
            format!("kvmmem {} in the guest", arguments.first().unwrap_or(&"")),
            is_right,
            error.trim(),
        );
        report.check("leaves nothing", world.settles(0)?, "");
    }
    Ok(())
}

/// What a view shows, by all ways.
pub(super) fn examine(
    report: &mut Report,
    tool: &mut Raw,
    view: &str,
    target: &LookedAt,
) -> Result<()> {
    let ranges = tool.must(&format!("ranges {view}"))?;
    let what = format!("pread shows the marker at {:#x}", target.gpa);
    report.equal(what, &tool.pread(view, target.gpa, 32)?, &Ok(target.hex.clone()));
    let page = tool.must(&format!("mmap {view} {:#x} 0x1000 r shared", target.gpa))?;
    report.equal(
        "a mapping shows it, by plain loads",
        &tool.load(&page, 32)?,
        &Ok(target.hex.clone()),
    );
    let changes = tool.changes(number(&page)? + COUNTER as u64)?;
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
    let windows = tool.must("bars")?;
    report.check(
        "all of it came as PCI functions",
        !windows.starts_with("0 "),
        format!("{windows}; {ranges}"),
    );
    Ok(())
}

/// Root of the guest takes the windows from the driver and stores into them.
fn hostile(world: &World, report: &mut Report, spec: &Spec, target: &LookedAt) -> Result<()> {
    let mut root = world.qemu_root_viewer(spec)?;
    // The window is the target's only file, so offsets are GPAs below its hole.
    let stored = root.must(&format!("barwrite {:#x} {SCRIBBLE}", target.gpa))?;
    report.check(
        "root stores into each window's BAR",
        number(&stored)? > 0,
        format!("{stored} windows"),
    );
    report.check("the target is as it was", target.is_whole(world)?, "");
    Ok(())
}

pub(super) fn pair(world: &mut World, report: &mut Report) -> Result<()> {
    let target = LookedAt::stock(world, &OLD_PC)?;
    add(world, &NEW_Q35, "report")?;
    let mut tool = world.qemu_viewer(&NEW_Q35)?;
    let grant = target.grant(world, 4, None)?;
    let (connection, view) = open(&mut tool, &grant)?;
    report.check("the new QEMU's guest attaches to the old one's", true, "");
    examine(report, &mut tool, &view, &target)?;

    let target = LookedAt::stock(world, &NEW_Q35)?;
    let mut introspector = world.viewer()?;
    let other = introspector.view(target.grant(world, 1, None)?.token.words())?;
    let seen = introspector.pread(&other, target.gpa, 32)?;
    report.equal(
        "while kvmmem vm's introspector looks at the new one",
        &seen,
        &Ok(target.hex.clone()),
    );
    tool.must(&format!("close {connection}"))?;
    introspector.must(&format!("close {other}"))?;
    report.check("both views are closed", world.settles(0)?, "");
    Ok(())
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest that lies, floods and writes where it may only read.

use anyhow::{Context, Result};
use kvmmem_proto::scope::Rights;

use super::field;
use crate::raw::errno;
use crate::report::Report;
use crate::wait;
use crate::world::World;

/// The most views of a VM.
const MOST_VIEWS: usize = 64;

/// Stores to a read-only window, each right after a page fault: an emulated SVM makes KVM see the
/// delivery of an event in some of them.
const STORES: u64 = 64;

pub(crate) fn hostile(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let marker = world.marker()?.hex.clone();
    let mut tool = world.viewer()?;
    let device = tool.view(world.grant(Rights::ReadOnly, None)?.token.words())?;

    let mut flooder = world.viewer()?;
    let bad = flooder.open()?;
    let mut wrong = 0;
    for round in 0..200u64 {
        wrong += usize::from(errno(flooder.attach(&bad, [round, 1, 2, 3])?) != "ENOENT");
    }
    report.equal("200 forged tokens are refused as unknown", &wrong, &0);
    let seen = errno(flooder.ask(&format!("seek {bad} 0 data"))?);
    report.equal("lseek without a view is refused", &seen, &"ENOTCONN".into());
    for (what, command) in [
        (
            "a mapping at the end of the address space",
            format!("mmap {device} 0xfffffffffffff000 0x1000 r shared"),
        ),
        (
            "a mapping of everything behind RAM",
            format!("mmap {device} 0x100000000000 0x1000 r shared"),
        ),
        ("a seek to a negative address", format!("seek {device} 0xfffffffffffff000 data")),
    ] {
        let seen = tool.ask(&command)?;
        report.check(format!("{what} is refused"), seen.is_err(), errno(seen));
    }

    let crowd = world
        .grant_as(|request| kvmmem_client::admin::GrantRequest { uses: 1000, ..request })?
        .token
        .words();
    let before = world.open_views()?;
    let mut opened = 0;
    let refused = loop {
        let slot = flooder.open()?;
        match flooder.attach(&slot, crowd)? {
            Ok(_) if opened <= MOST_VIEWS => opened += 1,
            Ok(_) => break "never".to_owned(),
            Err(errno) => break errno,
        }
        if opened >= 60 {
            break "60".to_owned();
        }
    };
    report.check("a process has many views", opened >= 50, format!("{opened}, then {refused}"));
    report.equal("the broker lists each", &(world.open_views()? - before), &opened);
    report.equal(
        "the first tool is not disturbed",
        &tool.pread(&device, gpa, 32)?,
        &Ok(marker.clone()),
    );
    drop(flooder);
    report.check("the flooder's end closes its views", world.settles(before)?, "");

    let page = tool.must(&format!("mmap {device} {gpa:#x} 0x1000 r shared"))?;
    tool.load(&page, 8)?.ok().context("no page")?;
    let descriptor = tool.must(&format!("fdinfo {device} kvmmem-view-descriptor"))?;
    let mut root = world.root_viewer()?;
    let wrote = errno(root.ask(&format!("poke {descriptor} {gpa:#x} 0x6b6f6b6f {STORES}"))?);
    report.equal("root stores to the read-only window by /dev/mem", &wrote, &"0".into());
    report.equal("nothing changes", &tool.pread(&device, gpa, 32)?, &Ok(marker.clone()));
    report.equal("and each store is counted", &counted_writes(world)?, &STORES);
    let internal = world.introspector()?.last_said("suberror")?.unwrap_or_default();
    report.check(
        "the introspector lives",
        field(&mut tool, &format!("stats {device}"), 0).is_ok(),
        internal,
    );
    Ok(())
}

/// Writes to read-only windows that the VMM refused, as the broker lists them; the VMM reports at
/// most once a second.
fn counted_writes(world: &World) -> Result<u64> {
    let mut count = 0;
    wait::until(|| {
        let grants = world.admin()?.grants()?;
        count = grants
            .iter()
            .flat_map(|grant| &grant.views)
            .map(|view| view.counters.refused_writes)
            .sum();
        Ok(count >= STORES)
    })?;
    Ok(count)
}

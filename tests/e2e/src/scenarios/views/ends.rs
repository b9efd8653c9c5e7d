// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ends of views: revoked, with the tool, with the target, with the broker.

use std::time::Instant;

use anyhow::{Context, Result};
use kvmmem_probe::COUNTER;
use kvmmem_proto::scope::Rights;

use super::state;
use super::use_it::hex;
use crate::raw::{Raw, SPIN_MS, errno};
use crate::report::Report;
use crate::world::World;

/// What is left of a view and its mapping at `page` once it has ended.
struct Remainder {
    load: String,
    pread: String,
    state: String,
}

impl Remainder {
    fn of(tool: &mut Raw, device: &str, page: &str, gpa: u64) -> Result<Self> {
        Ok(Self {
            load: errno(tool.load(page, 1)?),
            pread: errno(tool.pread(device, gpa, 8)?),
            state: state(tool, device)?,
        })
    }
}

/// How many interrupts of changed descriptors the introspector's handlers have got.
fn interrupts(world: &World) -> Result<u64> {
    let table = String::from_utf8(world.agent()?.get("/proc/interrupts")?)?;
    let line = table.lines().find(|line| line.contains("kvmmem"));
    let counts = line.context("the driver has no interrupt handler")?.split_whitespace().skip(1);
    Ok(counts.map_while(|count| count.parse::<u64>().ok()).sum())
}

pub(crate) fn revoke(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let end = world.max_gfn()? << 12;
    let grant = world.grant_as(|request| kvmmem_client::admin::GrantRequest {
        rights: Rights::ReadWrite,
        uses: 2,
        label: Some("views_revoke".into()),
        ..request
    })?;
    let kept = world.grant(Rights::ReadOnly, None)?.token.words();
    let (mut tool, mut waiter) = (world.viewer()?, world.viewer()?);
    let (device, other) = (tool.view(grant.token.words())?, tool.view(kept)?);
    let waiting = waiter.view(grant.token.words())?;
    let all = tool.must(&format!("mmap {device} 0 {end:#x} rw shared"))?;
    tool.must(&format!("touch {all} {end:#x} 0x1000"))?;
    let page = format!("{:#x}", hex(&all)? + gpa);
    let other_page = tool.must(&format!("mmap {other} {gpa:#x} 0x1000 r shared"))?;
    tool.load(&other_page, 1)?.ok().context("no page")?;

    let before = interrupts(world)?;
    // One process loads without end while another sleeps in poll.
    let counter = hex(&page)? + COUNTER as u64;
    tool.begin(&format!("spin {counter:#x} {SPIN_MS}"))?;
    waiter.begin(&format!("poll {waiting} {SPIN_MS}"))?;
    let start = Instant::now();
    let revoked = world.revoke(grant.grant)?;
    let told = start.elapsed();
    report.check(
        "both views are revoked, with confirmation",
        (revoked.views, revoked.unconfirmed) == (2, 0),
        format!("{revoked:?}; the call took {:.1} ms", told.as_secs_f64() * 1e3),
    );
    let polled = waiter.answer("poll")?;
    report.check(
        "poll tells of it",
        polled.as_ref().is_ok_and(|text| text.contains("hup")),
        format!("{polled:?}"),
    );
    report.check(
        "an interrupt has brought that to the driver",
        interrupts(world)? > before,
        format!("{before} before"),
    );
    let spun = tool.answer("spin")?;
    report.equal("the loop of loads ends in SIGBUS", &errno(spun), &"SIGBUS".into());
    let heard = start.elapsed();
    report.check(
        "the tools have heard",
        true,
        format!("{:.1} ms after the call", heard.as_secs_f64() * 1e3),
    );

    let left = Remainder::of(&mut tool, &device, &page, gpa)?;
    report.equal("nothing is left in the mapping", &left.load, &"SIGBUS".into());
    report.equal("nor for pread", &left.pread, &"EKEYREVOKED".into());
    report.equal("the state is revoked", &left.state, &"2".into());
    report.equal(
        "a new mapping is refused",
        &errno(tool.mmap(&device, gpa, 0x1000, "r")?),
        &"EKEYREVOKED".into(),
    );
    report.equal("another grant's view reads on", &tool.load(&other_page, 1)?.is_ok(), &true);
    report.check("the target keeps running", world.target_mut()?.process.is_running(), "");
    report.check(
        "the introspector keeps running",
        world.introspector_mut()?.process.is_running(),
        "",
    );
    let again = world.admin()?.revoke(grant.grant);
    report.check(
        "a second revocation ends nothing more",
        again.is_ok_and(|again| again.views == 0),
        "",
    );

    // Pages of v1 go the same way.
    let grant = world.grant(Rights::ReadWrite, None)?;
    let mut raw = world.raw()?;
    let (device, page) = (raw.open()?, raw.page()?);
    raw.map(&device, &page, gpa, grant.token.words())?.ok().context("not mapped")?;
    world.revoke(grant.grant)?;
    report.check("a page mapped by MAP is zero at once", raw.is_zero(&page)?, "");
    report.equal("and UNMAP works", &errno(raw.unmap(&device, &page)?), &"0".into());
    Ok(())
}

pub(crate) fn process_death(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    report.check("no view is left of the scenarios before", world.settles(0)?, "");
    let mut tool = world.viewer()?;
    let device = tool.view(world.grant(Rights::ReadOnly, None)?.token.words())?;
    let page = tool.must(&format!("mmap {device} {gpa:#x} 0x1000 r shared"))?;
    tool.load(&page, 8)?.ok().context("no page")?;
    report.equal("a view is open", &world.open_views()?, &1);
    tool.child.kill(9)?;
    report.check("SIGKILL closes it", world.settles(0)?, "");
    let counters = world.agent()?.get("/sys/kernel/debug/kvmmem/counters")?;
    let counters = String::from_utf8_lossy(&counters).into_owned();
    let open = counters.lines().find(|line| line.starts_with("views ")).map(str::to_owned);
    report.check(
        "the module counts none",
        open.as_deref() == Some("views 0"),
        counters.replace('\n', ", "),
    );
    Ok(())
}

pub(crate) fn target_death(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let mut tool = world.viewer()?;
    let device = tool.view(world.grant(Rights::ReadOnly, None)?.token.words())?;
    let page = tool.must(&format!("mmap {device} {gpa:#x} 0x1000 r shared"))?;
    tool.load(&page, 8)?.ok().context("no page")?;
    world.target_mut()?.process.kill()?;
    let polled = tool.must(&format!("poll {device} {SPIN_MS}"))?;
    report.check("poll tells of the end", polled.contains("hup"), &polled);
    let left = Remainder::of(&mut tool, &device, &page, gpa)?;
    report.equal("a load ends in SIGBUS", &left.load, &"SIGBUS".into());
    report.equal("pread says that the target is gone", &left.pread, &"ESTALE".into());
    report.equal("so does the state", &left.state, &"3".into());
    let vmm = world.introspector()?.process.id();
    report.equal(
        "the introspector's VMM holds no RAM but its own guest's",
        &crate::scenarios::death::rams(vmm)?,
        &1,
    );
    world.mend()?;
    tool.must(&format!("detach {device}"))?;
    let token = world.grant(Rights::ReadOnly, None)?.token.words();
    report.equal(
        "the file can be attached to a new target",
        &errno(tool.attach(&device, token)?),
        &"0".into(),
    );
    Ok(())
}

pub(crate) fn broker_death(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let mut tool = world.viewer()?;
    let device = tool.view(world.grant(Rights::ReadOnly, None)?.token.words())?;
    let page = tool.must(&format!("mmap {device} {gpa:#x} 0x1000 r shared"))?;
    tool.load(&page, 8)?.ok().context("no page")?;
    world.restart_broker()?;
    let polled = tool.must(&format!("poll {device} {SPIN_MS}"))?;
    report.check("poll tells of the end", polled.contains("hup"), &polled);
    let left = Remainder::of(&mut tool, &device, &page, gpa)?;
    report.equal("a load ends in SIGBUS", &left.load, &"SIGBUS".into());
    report.equal("pread says so", &left.pread, &"ESTALE".into());
    report.check("both VMs register with the new broker", world.wait_for_vms(2)?, "");
    world.mend()?;
    tool.must(&format!("detach {device}"))?;
    let token = world.grant(Rights::ReadOnly, None)?.token.words();
    report.equal("and a new grant attaches", &errno(tool.attach(&device, token)?), &"0".into());
    Ok(())
}

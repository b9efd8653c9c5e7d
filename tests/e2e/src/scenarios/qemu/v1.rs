// SPDX-License-Identifier: Apache-2.0 OR MIT
//! v1's and libkvmi's calls where no hypercall brings a token to the host.

use anyhow::{Context, Result, bail};
use kvmmem_client::admin::KvmiPolicy;
use kvmmem_guest::{Child, Command};
use kvmmem_proto::message::GrantState;

use super::looked_at::{LookedAt, add};
use super::{NEW_Q35, is_empty, number};
use crate::raw::{Raw, errno};
use crate::report::Report;
use crate::scenarios::mapping::{crowd, relay, tour_in};
use crate::wait::{self, PATIENCE};
use crate::world::{PROBE, TARGET, World};

/// How many mappings at once, by tokens of KVMI: each is a round trip out of the guest.
const MAPPINGS: usize = 100;

/// How often a token may expire on its way to its use.
const TRIES: usize = 20;

/// A tool in the guest that gets tokens for the others.
struct Vendor {
    child: Child,
}

impl Vendor {
    fn start(world: &World, port: u32) -> Result<Self> {
        let command = Command::new(PROBE).as_member().args(["vend", "--port", &port.to_string()]);
        let mut child = world.qemu(&NEW_Q35)?.agent.spawn(&command)?;
        if child.read_line(PATIENCE)?.is_none() {
            bail!("no tokens: {}", child.take_stderr());
        }
        Ok(Self { child })
    }

    fn token(&mut self) -> Result<[u64; 4]> {
        self.child.write_stdin(b"\n")?;
        let line = self.child.read_line(PATIENCE)?.context("the tokens ended")?;
        Ok(line.parse::<kvmmem::Token>().context("no token")?.words())
    }

    /// MAP with a fresh token, again where it has expired meanwhile: the token, and MAP's errno.
    fn map(&mut self, tool: &mut Raw, slot: &str, page: &str, gpa: u64) -> Result<String> {
        let mut seen = String::new();
        for _ in 0..TRIES {
            seen = errno(tool.map(slot, page, gpa, self.token()?)?);
            if seen != "ENOENT" {
                break;
            }
        }
        Ok(seen)
    }
}

pub(super) fn v1(world: &mut World, report: &mut Report) -> Result<()> {
    let target = LookedAt::ours(world)?;
    add(world, &NEW_Q35, "report")?;
    let (endpoint, port) = world.qemu_hook(&NEW_Q35)?;
    tour_in(world, report, Some(&NEW_Q35), port)?;
    report.check("one view is plugged in for it", world.open_views()? == 1, "");
    let child = crowd(world, Some(&NEW_Q35), Some(port), MAPPINGS)?;
    relay(world, child, report)?;
    report.check("and for all tools", world.open_views()? == 1, "");

    let mut vendor = Vendor::start(world, port)?;
    refusals(world, report, &mut vendor, &target)?;
    killed(world, report, &mut vendor, &target)?;
    regions(world, report, &mut vendor, &target)?;
    policy(world, report, &mut vendor, &target)?;
    revoked(world, report, &mut vendor, &target)?;

    let mut tool = world.qemu_raw(&NEW_Q35)?;
    let (device, page) = (tool.open()?, tool.page()?);
    report.equal(
        "MAP before the hook is undone",
        &vendor.map(&mut tool, &device, &page, target.gpa)?,
        &"0".into(),
    );
    world.kvmmem(&["hook", "remove", TARGET, &endpoint])?;
    report.check("with the hook the page ends in SIGBUS", is_lost(&mut tool, &page)?, "");
    report.check("and the view in QEMU", is_empty(world, &NEW_Q35)? && world.settles(0)?, "");
    report.equal("UNMAP gives the page back", &errno(tool.unmap(&device, &page)?), &"0".into());
    report.check("it holds zeros", tool.is_zero(&page)?, "");
    report.check("the target is as it was", target.is_whole(world)?, "");
    Ok(())
}

fn refusals(
    world: &World,
    report: &mut Report,
    vendor: &mut Vendor,
    target: &LookedAt,
) -> Result<()> {
    let mut tool = world.qemu_raw(&NEW_Q35)?;
    let (device, page, gpa) = (tool.open()?, tool.page()?, target.gpa);
    let mut refuse = |what: &str, page: &str, gpa: u64, wanted: &str| -> Result<()> {
        let seen = errno(tool.map(&device, page, gpa, [7; 4])?);
        report.equal(format!("MAP: {what}"), &seen, &wanted.to_owned());
        Ok(())
    };
    refuse("an unknown token", &page, gpa, "ENOENT")?;
    refuse("an unaligned gpa", &page, gpa + 8, "EINVAL")?;
    refuse("an address in the kernel's half", "0xffff888000001000", gpa, "EINVAL")?;
    let shared = tool.must("page shared")?;
    let seen = errno(tool.map(&device, &shared, gpa, [7; 4])?);
    report.equal("MAP: shared memory", &seen, &"EINVAL".into());
    report.equal(
        "MAP: a hole of the target",
        &vendor.map(&mut tool, &device, &page, 1 << 40)?,
        &"EFAULT".into(),
    );
    report.equal("UNMAP: nothing there", &errno(tool.unmap(&device, &page)?), &"ENOENT".into());

    let mut token = vendor.token()?;
    let mut mapped = errno(tool.map(&device, &page, gpa, token)?);
    for _ in 0..TRIES {
        if mapped == "ENOENT" {
            token = vendor.token()?;
            mapped = errno(tool.map(&device, &page, gpa, token)?);
        }
    }
    report.equal("MAP", &mapped, &"0".into());
    report.check("the page shows the marker", tool.read(&page)?.starts_with(&target.hex), "");
    let other = tool.page()?;
    let seen = errno(tool.map(&device, &other, gpa, token)?);
    report.equal("the token works once", &seen, &"ENOENT".into());
    let spent = wait::until(|| {
        let grants = world.admin()?.grants()?;
        Ok(grants.iter().max_by_key(|grant| grant.id).map(|grant| grant.state)
            == Some(GrantState::Spent))
    })?;
    report.check("and the broker knows", spent, "");
    let seen = errno(tool.map(&device, &page, gpa, vendor.token()?)?);
    report.equal("MAP: a page in use", &seen, &"EALREADY".into());
    report.equal("UNMAP", &errno(tool.unmap(&device, &page)?), &"0".into());
    report.check("leaves zeros", tool.is_zero(&page)?, "");
    Ok(())
}

fn killed(
    world: &World,
    report: &mut Report,
    vendor: &mut Vendor,
    target: &LookedAt,
) -> Result<()> {
    let mut tool = world.qemu_raw(&NEW_Q35)?;
    let (device, page) = (tool.open()?, tool.page()?);
    let seen = vendor.map(&mut tool, &device, &page, target.gpa)?;
    report.equal("MAP in a tool that is killed", &seen, &"0".into());
    tool.child.kill(9)?;
    let agent = &world.qemu(&NEW_Q35)?.agent;
    let is_gone = wait::until(|| {
        let counters = agent.get("/sys/kernel/debug/kvmmem/counters")?;
        Ok(String::from_utf8_lossy(&counters).contains("mapped 0\n"))
    })?;
    report.check("nothing of it is left", is_gone, "");
    Ok(())
}

fn regions(
    world: &World,
    report: &mut Report,
    vendor: &mut Vendor,
    target: &LookedAt,
) -> Result<()> {
    let targets = world.targets()?;
    let target_vm = targets.iter().find(|vm| vm.identity.name == TARGET).context("no target")?;
    let uuid = target_vm.identity.uuid;
    let mut tool = world.qemu_viewer(&NEW_Q35)?;
    let device = tool.open()?;
    let probed = errno(tool.ask(&format!("region {device} unmap 0"))?);
    report.equal("libkvmi's probe finds the region calls", &probed, &"0".into());
    tool.must(&format!("region {device} open {}", uuid.simple()))?;
    let mut region = Err("no token".to_owned());
    for _ in 0..TRIES {
        let [a, b, c, d] = vendor.token()?;
        let map = format!("region {device} map {:#x} {a:#x} {b:#x} {c:#x} {d:#x}", target.gpa);
        region = tool.ask(&map)?;
        if errno(region.clone()) != "ENOENT" {
            break;
        }
    }
    let region = region.unwrap_or_else(|errno| errno);
    let (start, len) = region.split_once(' ').context(region.clone())?;
    report.check("MAP answers the region", number(start)? == 0, &region);
    let at = number(&tool.must(&format!("mmap {device} {start} {len} rw shared"))?)?;
    let page = format!("{:#x}", at + target.gpa);
    report.equal("mmap shows the marker", &tool.load(&page, 32)?, &Ok(target.hex.clone()));
    tool.must(&format!("munmap {at:#x} {len}"))?;
    let seen = errno(tool.ask(&format!("region {device} unmap {start}"))?);
    report.equal("UNMAP", &seen, &"0".into());
    Ok(())
}

fn policy(
    world: &World,
    report: &mut Report,
    vendor: &mut Vendor,
    target: &LookedAt,
) -> Result<()> {
    let mut tool = world.qemu_raw(&NEW_Q35)?;
    let (device, page) = (tool.open()?, tool.page()?);
    world.admin()?.policy(TARGET, Some(KvmiPolicy::ReadOnly))?;
    let seen = vendor.map(&mut tool, &device, &page, target.gpa);
    world.admin()?.policy(TARGET, Some(KvmiPolicy::ReadWrite))?;
    report.equal("MAP where the target's policy is read-only", &seen?, &"EPERM".into());
    Ok(())
}

fn revoked(
    world: &World,
    report: &mut Report,
    vendor: &mut Vendor,
    target: &LookedAt,
) -> Result<()> {
    let mut tool = world.qemu_raw(&NEW_Q35)?;
    let (device, page) = (tool.open()?, tool.page()?);
    let seen = vendor.map(&mut tool, &device, &page, target.gpa)?;
    report.equal("MAP before its grant is revoked", &seen, &"0".into());
    let grants = world.admin()?.grants()?;
    let writes = |grant: &&kvmmem_client::admin::GrantInfo| {
        !grant.views.is_empty() && grant.scope.rights == kvmmem_proto::scope::Rights::ReadWrite
    };
    let grant = grants.iter().find(writes).context("no grant has a view")?.id;
    world.revoke(grant)?;
    report.check("the page ends in SIGBUS", is_lost(&mut tool, &page)?, "");
    let seen = vendor.map(&mut tool, &device, &page, target.gpa)?;
    report.equal("MAP there needs UNMAP first", &seen, &"EALREADY".into());
    report.equal("UNMAP", &errno(tool.unmap(&device, &page)?), &"0".into());
    report.check("leaves zeros", tool.is_zero(&page)?, "");
    let seen = vendor.map(&mut tool, &device, &page, target.gpa)?;
    report.equal("the next token has a new view plugged in", &seen, &"0".into());
    report.check("the page shows the marker", tool.read(&page)?.starts_with(&target.hex), "");
    Ok(())
}

/// Whether reading a page soon ends in SIGBUS.
fn is_lost(tool: &mut Raw, page: &str) -> Result<bool> {
    wait::until(|| Ok(errno(tool.ask(&format!("read {page}"))?) == "SIGBUS"))
}

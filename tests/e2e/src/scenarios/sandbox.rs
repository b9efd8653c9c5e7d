// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sandbox of `kvmmem vm`: what an introspector's VMM may do, and holds, while it works.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use kvmmem_client::admin::GrantRequest;
use kvmmem_proto::scope::Rights;

use crate::raw::errno;
use crate::report::Report;
use crate::wait;
use crate::world::World;

/// Kinds of descriptors that an introspector's VMM holds, by what their links begin with.
const DESCRIPTORS: [&str; 9] = [
    "/dev/kvm",
    "/dev/null",
    "/dev/vhost-vsock",
    "/memfd:kvmmem-",
    "anon_inode:[eventfd]",
    "anon_inode:kvm-vcpu",
    "anon_inode:kvm-vm",
    "socket:",
    // The log and the serial port's output.
    "/tmp/kvmmem-e2e-",
];

pub(crate) fn sandbox(world: &mut World, report: &mut Report) -> Result<()> {
    for (what, vm) in [
        ("the target's VMM is in its sandbox", world.target()?),
        ("the introspector's VMM is in its sandbox", world.introspector()?),
    ] {
        let (is_so, detail) = vm.sandbox()?;
        report.check(what, is_so, detail);
    }
    let pid = world.introspector()?.process.id();
    work(world)?;
    let before = descriptors(pid)?;
    let unknown: Vec<_> = before
        .keys()
        .filter(|link| !DESCRIPTORS.iter().any(|kind| link.starts_with(kind)))
        .collect();
    report.check("the VMM holds no descriptor that it does not need", unknown.is_empty(), {
        format!("{unknown:?}")
    });
    for _ in 0..5 {
        work(world)?;
    }
    // The target's file is released by a thread.
    let same = wait::until(|| Ok(descriptors(pid)? == before))?;
    let after = descriptors(pid)?;
    report.check("and none is left of pages and views", same, format!("{before:?} {after:?}"));

    world.restart_broker()?;
    report.check("it reconnects to a new broker", world.wait_for_vms(2)?, "");
    let vmm = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no process")?;
    rustix::process::kill_process(vmm, rustix::process::Signal::TERM)?;
    let status = world.introspector_mut()?.process.wait(wait::PATIENCE)?;
    report.check("and ends by SIGTERM", status.success(), format!("{status}"));
    world.mend()
}

/// A page and a view, read, searched, revoked.
fn work(world: &mut World) -> Result<()> {
    let gpa = world.gpa()?;
    let mut raw = world.raw()?;
    let (device, page, token) = (raw.open()?, raw.page()?, world.token()?);
    raw.map(&device, &page, gpa, token)?.ok().context("not mapped")?;
    raw.unmap(&device, &page)?.ok().context("not unmapped")?;
    let grant =
        world.grant_as(|usual| GrantRequest { rights: Rights::ReadWrite, uses: 1, ..usual })?;
    let mut tool = world.viewer()?;
    let view = tool.view(grant.token.words())?;
    for what in ["data", "hole"] {
        tool.must(&format!("seek {view} {gpa:#x} {what}"))?;
    }
    let page = tool.must(&format!("mmap {view} {gpa:#x} 0x1000 r shared"))?;
    tool.load(&page, 1)?.ok().context("the view shows nothing")?;
    world.revoke(grant.grant)?;
    let ended = Instant::now() + wait::PATIENCE;
    while errno(tool.load(&page, 1)?) != "SIGBUS" {
        anyhow::ensure!(Instant::now() < ended, "a revoked view can still be read");
    }
    tool.must(&format!("close {view}")).map(drop)
}

/// How many descriptors of each kind a process holds. Numbers of objects are left out.
fn descriptors(pid: u32) -> Result<BTreeMap<String, usize>> {
    let mut count = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).context("cannot list descriptors")? {
        let link = std::fs::read_link(entry?.path()).unwrap_or_default();
        let link = link.to_string_lossy();
        let kind = if link.starts_with("socket:") { "socket:" } else { &*link };
        *count.entry(kind.to_owned()).or_default() += 1;
    }
    Ok(count)
}

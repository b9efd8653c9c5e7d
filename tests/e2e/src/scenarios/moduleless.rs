// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Introspectors under a stock QEMU whose guests do not have the module: with the kernels of
//! distributions, and with the test bed's own.

use anyhow::{Context, Result, ensure};
use kvmmem_client::admin::NewGrant;
use kvmmem_guest::{Child, Command, KVMMEM_GID, Output};
use kvmmem_probe::{MARKER_LEN, Ready, Step, hex, page_marker};
use kvmmem_proto::scope::Span;
use serde_json::{Value, json};

use crate::qemu::{Ram, Release, Spec, VIEWS};
use crate::report::Report;
use crate::scenarios::Scenario;
use crate::scenarios::qemu::is_empty;
use crate::scenarios::qemu::looked_at::{LookedAt, name_of};
use crate::scenarios::views::act::follow;
use crate::vm;
use crate::wait::{self, PATIENCE};
use crate::world::{CLI, PROBE, World};

/// SIGKILL, SIGTERM, SIGCONT and SIGSTOP.
const KILL: i32 = 9;
const TERM: i32 = 15;
const CONT: i32 = 18;
const STOP: i32 = 19;

/// The scenarios of this file.
pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        name: "moduleless_5_10",
        purpose: "an introspector with Debian 11's kernel and without the module",
        run: |world, report| run(world, report, &with_kernel("bullseye", "no-module-5-10", 21)),
    },
    Scenario {
        name: "moduleless_6_1",
        purpose: "the same with Debian 12's kernel",
        run: |world, report| run(world, report, &with_kernel("bookworm", "no-module-6-1", 22)),
    },
    Scenario {
        name: "moduleless_6_12",
        purpose: "the same with Debian 13's kernel",
        run: |world, report| run(world, report, &with_kernel("trixie", "no-module-6-12", 23)),
    },
    Scenario {
        name: "moduleless_7_3",
        purpose: "the same with the test bed's kernel, whose module was used and unloaded",
        run: |world, report| {
            let spec = Spec { kernel: None, ..with_kernel("", "no-module-7-3", 24) };
            run(world, report, &spec)
        },
    },
];

const fn with_kernel(kernel: &'static str, name: &'static str, cid: u32) -> Spec {
    Spec {
        name,
        release: Release::Trixie,
        machine: "q35",
        mib: 512,
        ram: Ram::Private,
        cid,
        // The emulated CPU is an AMD one with 40 address bits, and smaller ports would lie in its
        // HyperTransport hole.
        largest: "5G",
        kernel: Some(kernel),
    }
}

fn run(world: &mut World, report: &mut Report, spec: &Spec) -> Result<()> {
    let target = LookedAt::ours(world)?;
    let release = world.boot_qemu(spec)?.agent.get("/proc/sys/kernel/osrelease")?;
    if spec.kernel.is_none() {
        after_the_module(world, report, spec, &target)?;
    }
    let release = String::from_utf8_lossy(&release).trim().to_owned();
    untrusted(world, report, spec, &target, &release)?;
    add(world, spec, true)?;
    look(world, report, spec, &target)?;
    revoked_while_read(world, report, spec, &target)?;
    stopped(world, report, spec, &target)?;
    unprivileged(world, report, spec, &target)?;
    locked_down(world, report, spec, &target)?;
    report.check("the target is as it was", target.is_whole(world)?, "");
    world.end_qemu(spec);
    Ok(())
}

/// A tool uses a view by the module, which is unloaded then.
fn after_the_module(
    world: &mut World,
    report: &mut Report,
    spec: &Spec,
    target: &LookedAt,
) -> Result<()> {
    add(world, spec, false)?;
    let grant = target.grant(world, 1, None)?;
    let output =
        cli(world, spec, &grant, &["read", &format!("{:#x}", target.gpa), "32", "--json"])?;
    let is_read = output.text().contains(&target.hex);
    report.check("with the module the command reads the marker", is_read, output.error_text());
    ensure!(world.settles(0)? && is_empty(world, spec)?, "the view does not end");
    without_module(world, spec)
}

/// Unloads the module, which the test bed's own kernel loads when it boots.
fn without_module(world: &World, spec: &Spec) -> Result<()> {
    if spec.kernel.is_none() {
        world.qemu(spec)?.agent.unload_module("kvmmem")?;
    }
    Ok(())
}

/// Makes the VM an introspector.
fn add(world: &World, spec: &Spec, is_trusted: bool) -> Result<()> {
    let name = name_of(spec);
    if world.has(&name)? {
        world.kvmmem(&["introspector", "remove", &name])?;
    }
    let socket = world.qemu(spec)?.socket().display().to_string();
    let mut words = vec!["introspector", "add", "--qmp", &socket, "--name", &name];
    words.extend(is_trusted.then_some("--trusted"));
    world.kvmmem(&words).map(drop)
}

fn untrusted(
    world: &mut World,
    report: &mut Report,
    spec: &Spec,
    target: &LookedAt,
    release: &str,
) -> Result<()> {
    add(world, spec, false)?;
    let grant = target.grant(world, 1, None)?;
    let output = cli(world, spec, &grant, &["read", &format!("{:#x}", target.gpa), "32"])?;
    let text = output.error_text();
    report.check(
        format!("{release}: an introspector that is not trusted needs the module"),
        !output.status.success() && text.contains("--trusted"),
        text.trim(),
    );
    Ok(())
}

/// Runs the command in the guest, as root.
fn cli(world: &World, spec: &Spec, grant: &NewGrant, words: &[&str]) -> Result<Output> {
    let token = grant.token.to_hex();
    let command = Command::new(CLI).args(words.iter().copied()).env("KVMMEM_TOKEN", token.as_str());
    Ok(world.qemu(spec)?.agent.run(&command, PATIENCE)?)
}

/// A tool attaches, scans all of the target's RAM, watches, and loses its view.
fn look(world: &mut World, report: &mut Report, spec: &Spec, target: &LookedAt) -> Result<()> {
    let grant = target.grant(world, 1, None)?;
    let output =
        cli(world, spec, &grant, &["read", &format!("{:#x}", target.gpa), "32", "--json"])?;
    report.check(
        "the command reads the marker",
        output.text().contains(&target.hex),
        output.error_text(),
    );
    report.check("its view is closed", world.settles(0)? && is_empty(world, spec)?, "");
    report.equal(
        "and its port is free again",
        &settled_slots(world, spec, &free(VIEWS))?,
        &free(VIEWS),
    );
    let command =
        probe(&grant, "spy").args(["--gpa", &target.gpa.to_string(), "--marker", &target.hex]);
    let child = world.qemu(spec)?.agent.spawn(&command)?;
    follow(report, child, |report| {
        let revoked = world.revoke(grant.grant)?;
        report.check("the grant is revoked", revoked.views == 1, format!("{revoked:?}"));
        Ok(())
    })?;
    report.check("QEMU has no window any more", is_empty(world, spec)?, "");
    reset_if_retired(world, spec)
}

/// Two grants, of a page each that differ in their first bytes.
struct PageGrants {
    pages: [(NewGrant, u64, String); 2],
}

impl PageGrants {
    fn new(world: &mut World, target: &LookedAt) -> Result<Self> {
        let marker = world.marker()?;
        let bytes: Vec<u8> = (0..MARKER_LEN)
            .map(|at| u8::from_str_radix(marker.hex.get(2 * at..2 * at + 2).unwrap_or("x"), 16))
            .collect::<Result<_, _>>()?;
        let bytes: [u8; MARKER_LEN] = bytes.try_into().ok().context("the marker is too short")?;
        let gpas: Vec<u64> = marker.gpas.iter().take(2).copied().collect();
        let page = |index: usize| -> Result<(NewGrant, u64, String)> {
            let gpa = *gpas.get(index).context("the marker has one page")?;
            let grant = target.grant(world, 8, Some(vec![Span { gpa, len: 0x1000 }]))?;
            Ok((grant, gpa, hex(&page_marker(&bytes, index))))
        };
        Ok(Self { pages: [page(0)?, page(1)?] })
    }

    /// Starts a tool that reads one of the pages until it has lost its view; it reads when this
    /// returns. With its process id.
    fn hold(&self, world: &World, spec: &Spec, index: usize) -> Result<(Child, u32)> {
        self.hold_as(world, spec, index, |command| command)
    }

    fn hold_as(
        &self,
        world: &World,
        spec: &Spec,
        index: usize,
        user: fn(Command) -> Command,
    ) -> Result<(Child, u32)> {
        let (grant, gpa, bytes) = self.pages.get(index).context("no such page")?;
        let command = probe(grant, "hold").args(["--gpa", &gpa.to_string(), "--bytes", bytes]);
        let mut child = world.qemu(spec)?.agent.spawn(&user(command))?;
        while let Some(line) = child.read_line(PATIENCE)? {
            if let Ok(Ready { ready }) = serde_json::from_str(&line) {
                return Ok((child, ready));
            }
            let step: Step = serde_json::from_str(&line)?;
            ensure!(step.ok, "{}: {}", step.what, step.detail);
        }
        anyhow::bail!("the tool has ended: {}", child.take_stderr())
    }
}

/// Tools are stopped, so that they do not acknowledge; later views are plugged in elsewhere, and
/// a tool that runs again believes nothing that it reads. A tool that is killed has acknowledged.
fn stopped(world: &mut World, report: &mut Report, spec: &Spec, target: &LookedAt) -> Result<()> {
    let page = PageGrants::new(world, target)?;
    let (mut first, pid) = page.hold(world, spec, 0)?;
    stop(world, spec, &mut first, pid)?;
    let [(grant, ..), (other, ..)] = &page.pages;
    let revoked = world.revoke(grant.grant)?;
    report.check("the grant of a tool that is stopped is revoked", revoked.views == 1, "");
    report.check("its devices are unplugged all the same", is_empty(world, spec)?, "");
    let retired = wait::until(|| Ok(slots(world, spec)?.1.len() == 1))?;
    report.check("and its port is retired", retired, format!("{:?}", slots(world, spec)?));
    let (mut second, _) = page.hold(world, spec, 1)?;
    first.kill(CONT)?;
    report_end(report, "the tool runs again beside the next view", &mut first)?;
    second.kill(KILL)?;
    second.wait(PATIENCE)?;
    let unplugged = world.settles(0)? && is_empty(world, spec)?;
    let (_, retired) = slots(world, spec)?;
    let (left, retired) = settled_slots(world, spec, &(VIEWS as u64 - 1, retired))?;
    report.check(
        "a tool that is killed costs no port",
        unplugged && left == VIEWS as u64 - 1 && retired.len() == 1,
        format!("{left} free, retired {retired:?}"),
    );
    let (mut third, pid) = page.hold(world, spec, 1)?;
    stop(world, spec, &mut third, pid)?;
    world.revoke(other.grant)?;
    let text = world.kvmmem(&["introspector", "list"])?;
    let all = wait::until(|| Ok(slots(world, spec)?.1.len() == VIEWS))?;
    report.check("another tool that is stopped costs the other port", all, text);
    third.kill(KILL)?;
    third.wait(PATIENCE)?;
    let grant = target.grant(world, 1, None)?;
    let output = cli(world, spec, &grant, &["read", &format!("{:#x}", target.gpa), "32"])?;
    let text = output.error_text();
    report.check(
        "no view is opened now, and the reason is told",
        !output.status.success() && text.contains("reset"),
        text.trim(),
    );
    reset(world, spec)?;
    let again = wait::until(|| Ok(slots(world, spec)? == free(VIEWS)))?;
    report.check("a reset brings the ports back", again, format!("{:?}", slots(world, spec)?));
    Ok(())
}

/// Stops a tool, with its process id.
fn stop(world: &World, spec: &Spec, tool: &mut Child, pid: u32) -> Result<()> {
    tool.kill(STOP)?;
    let stat = format!("/proc/{pid}/stat");
    let is_stopped = wait::until(|| {
        let stat = world.qemu(spec)?.agent.get(&stat)?;
        Ok(String::from_utf8_lossy(&stat).contains(") T "))
    })?;
    ensure!(is_stopped, "the tool does not stop");
    Ok(())
}

/// The tool's last step.
fn report_end(report: &mut Report, what: &str, child: &mut Child) -> Result<()> {
    let line = child.read_line(PATIENCE)?.context("the tool has said nothing")?;
    let step: Step = serde_json::from_str(&line)?;
    report.check(format!("{what}: {}", step.what), step.ok, step.detail);
    child.wait(PATIENCE)?;
    Ok(())
}

/// Views are revoked while they are read, and others are plugged in at their addresses at once.
fn revoked_while_read(
    world: &mut World,
    report: &mut Report,
    spec: &Spec,
    target: &LookedAt,
) -> Result<()> {
    for _ in 0..5 {
        let page = PageGrants::new(world, target)?;
        let mut tools = Vec::new();
        for (index, (grant, ..)) in page.pages.iter().enumerate() {
            tools.push(page.hold(world, spec, index)?.0);
            world.revoke(grant.grant)?;
        }
        for tool in &mut tools {
            report_end(report, "revoked while it reads", tool)?;
        }
        report.check("its devices are gone", is_empty(world, spec)?, "");
        reset_if_retired(world, spec)?;
    }
    Ok(())
}

/// Tools that are not root attach by the proxy, which is; their ends cost no port.
fn unprivileged(
    world: &mut World,
    report: &mut Report,
    spec: &Spec,
    target: &LookedAt,
) -> Result<()> {
    let read = |world: &World, user: fn(Command) -> Command| -> Result<Output> {
        let grant = target.grant(world, 1, None)?;
        let token = grant.token.to_hex();
        let command =
            Command::new(CLI).args(["read", &format!("{:#x}", target.gpa), "32", "--json"]);
        let command = user(command.env("KVMMEM_TOKEN", token.as_str()));
        Ok(world.qemu(spec)?.agent.run(&command, PATIENCE)?)
    };
    let output = read(world, Command::as_member)?;
    let text = output.error_text();
    report.check(
        "a tool that is not root is told of the proxy",
        !output.status.success() && text.contains("kvmmem proxy"),
        text.trim(),
    );
    report.check("and nothing stays plugged in", world.settles(0)? && is_empty(world, spec)?, "");

    let group = KVMMEM_GID.to_string();
    let command = Command::new(CLI).args(["proxy", "--group", &group]);
    let mut proxy = world.qemu(spec)?.agent.spawn(&command)?;
    let line = proxy.read_line(PATIENCE)?.context("the proxy has said nothing")?;
    ensure!(line.contains("listening"), "the proxy says {line}");
    let output = read(world, Command::as_member)?;
    let right = output.text().contains(&target.hex);
    report.check("with it the tool reads the marker", right, output.error_text());
    let output = read(world, Command::as_other_user)?;
    let text = output.error_text();
    report.check(
        "a user who is not in the group is refused",
        !output.status.success() && text.contains("denied"),
        text.trim(),
    );
    let page = PageGrants::new(world, target)?;
    for (index, end) in [KILL, TERM].into_iter().enumerate() {
        let (mut tool, _) = page.hold_as(world, spec, index, Command::as_member)?;
        if end == KILL {
            tool.kill(KILL)?;
            tool.wait(PATIENCE)?;
        } else {
            let (grant, ..) = page.pages.get(index).context("no such page")?;
            let revoked = world.revoke(grant.grant)?;
            report.check("its grant is revoked", revoked.views == 1, format!("{revoked:?}"));
            report_end(report, "revoked while it reads", &mut tool)?;
        }
        let is_gone = world.settles(0)? && is_empty(world, spec)?;
        report.check("the view of a tool that is not root is gone", is_gone, "");
        // A revocation costs one where the guest is slow.
        if end == KILL {
            let left = settled_slots(world, spec, &free(VIEWS))?;
            report.equal("and costs no port", &left, &free(VIEWS));
        }
    }
    let (_, retired) = slots(world, spec)?;
    let left = (VIEWS.saturating_sub(retired.len()) as u64, retired);
    let (mut tool, _) = page.hold_as(world, spec, 0, Command::as_member)?;
    proxy.kill(TERM)?;
    let ended = proxy.wait(PATIENCE)?;
    report.check("the proxy ends by SIGTERM", ended.success(), ended.to_string());
    report_end(report, "the proxy has ended", &mut tool)?;
    report.check("and its view", world.settles(0)? && is_empty(world, spec)?, "");
    report.equal("and costs no port", &settled_slots(world, spec, &left)?, &left);
    reset_if_retired(world, spec)
}

/// Resets the VM if a guest that got little of the CPUs has acknowledged too late.
fn reset_if_retired(world: &mut World, spec: &Spec) -> Result<()> {
    if slots(world, spec)? != free(VIEWS) {
        reset(world, spec)?;
        ensure!(wait::until(|| Ok(slots(world, spec)? == free(VIEWS)))?, "the ports stay retired");
    }
    Ok(())
}

/// A kernel that is locked down maps no devices.
fn locked_down(
    world: &mut World,
    report: &mut Report,
    spec: &Spec,
    target: &LookedAt,
) -> Result<()> {
    world.qemu_root_viewer(spec)?.must("write /sys/kernel/security/lockdown integrity")?;
    let grant = target.grant(world, 1, None)?;
    let output = cli(world, spec, &grant, &["read", &format!("{:#x}", target.gpa), "32"])?;
    let text = output.error_text();
    report.check(
        "a kernel that is locked down needs the module",
        !output.status.success() && text.contains("locked down") && text.contains("module"),
        text.trim(),
    );
    report.check("nothing stays plugged in", world.settles(0)? && is_empty(world, spec)?, "");
    Ok(())
}

fn probe(grant: &NewGrant, verb: &str) -> Command {
    let token = grant.token.to_hex();
    Command::new(PROBE).env("KVMMEM_TOKEN", token.as_str()).args([verb])
}

/// Resets the VM and waits for its agent.
fn reset(world: &mut World, spec: &Spec) -> Result<()> {
    world.qemu(spec)?.qmp("system_reset", &json!({}))?;
    // The agent of before must not answer.
    world.settles(0)?;
    let run = world.run_folder();
    let qemu = world.qemu_mut(spec)?;
    vm::wait_for_agent(spec.name, spec.cid, &mut qemu.process, &run)?;
    without_module(world, spec)
}

/// How many slots are free, and the buses that are retired, as the command lists them.
fn slots(world: &World, spec: &Spec) -> Result<(u64, Vec<String>)> {
    let text = world.kvmmem(&["introspector", "list", "--json"])?;
    let name = name_of(spec);
    let lines = text.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    let line = lines.iter().find(|line| line["name"] == *name).context("it is not listed")?;
    let retired = line["slots"]["retired"].as_array().context("no list of retired ports")?;
    let retired = retired.iter().filter_map(|bus| bus.as_str().map(str::to_owned)).collect();
    Ok((line["slots"]["free"].as_u64().context("no number of free slots")?, retired))
}

/// The slots once they are as is wanted, or as they are at last: a view takes its slots until the
/// broker knows that QEMU has released its memory.
fn settled_slots(
    world: &World,
    spec: &Spec,
    wanted: &(u64, Vec<String>),
) -> Result<(u64, Vec<String>)> {
    wait::until(|| Ok(slots(world, spec)? == *wanted))?;
    slots(world, spec)
}

fn free(count: usize) -> (u64, Vec<String>) {
    (count as u64, Vec::new())
}

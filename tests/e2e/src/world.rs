// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker, a target and an introspector: what most scenarios start from.

mod stock;

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use kvmmem::{Endpoint, Listener, Session};
use kvmmem_client::admin::{Admin, GrantRequest, NewGrant, RevokeReport, TargetInfo};
use kvmmem_guest::{Agent, Child, Command as GuestCommand};
use kvmmem_probe::TargetReport;
use kvmmem_proto::scope::{Rights, Span};
use tempfile::TempDir;
use uuid::Uuid;

use crate::process::Process;
use crate::qemu::Qemu;
use crate::raw::Raw;
use crate::test_bed::TestBed;
use crate::vm::{Role, Spec, Vm, Way};
use crate::wait::{self, PATIENCE};

/// The name of the target in the broker.
pub(crate) const TARGET: &str = "target";
/// The VM that looks.
pub(crate) const INTROSPECTOR: &str = "introspector";
/// Where the probe, the tools in C and the command line are inside the guests.
pub(crate) const PROBE: &str = "/bin/kvmmem-probe";
pub(crate) const CLI: &str = "/bin/kvmmem";
pub(crate) const BENCH: &str = "/tmp/kvmmem-bench";
const RAW: &str = "/bin/kvmmem-raw";
const VIEW: &str = "/bin/kvmmem-view";

const TARGET_SPEC: Spec = Spec {
    name: TARGET,
    role: Role::Target,
    cid: 3,
    vcpus: 1,
    way: Way::Auto,
    uuid: "7a4e6f1c-0000-4000-8000-000000000003",
};
const INTROSPECTOR_SPEC: Spec = Spec {
    name: INTROSPECTOR,
    role: Role::Introspector,
    cid: 4,
    vcpus: 1,
    way: Way::Auto,
    uuid: "7a4e6f1c-0000-4000-8000-000000000004",
};

/// The marker program that runs in the target.
pub(crate) struct Marker {
    pub(crate) child: Child,
    pub(crate) gpas: Vec<u64>,
    pub(crate) hex: String,
}

/// A whole system. Parts that a scenario killed are brought back by [`World::mend`].
pub(crate) struct World {
    pub(crate) bed: TestBed,
    run: TempDir,
    broker: Process,
    target: Option<Vm>,
    introspector: Option<Vm>,
    marker: Option<Marker>,
    session: Option<Session>,
    qemus: Vec<Qemu>,
    way: Way,
    next_port: u32,
}

impl World {
    /// Starts all of it; about half a minute under software emulation.
    pub(crate) fn start(bed: TestBed) -> Result<Self> {
        let mut world = Self::without_vms(bed)?;
        world.mend()?;
        Ok(world)
    }

    /// Starts the broker alone.
    pub(crate) fn without_vms(bed: TestBed) -> Result<Self> {
        let run = tempfile::Builder::new()
            .prefix("kvmmem-e2e-")
            .tempdir()
            .context("no place to run in")?;
        let broker = Self::start_broker(&bed, &run)?;
        Ok(Self {
            bed,
            run,
            broker,
            target: None,
            introspector: None,
            marker: None,
            session: None,
            qemus: Vec::new(),
            way: Way::Auto,
            next_port: 5000,
        })
    }

    fn start_broker(bed: &TestBed, run: &TempDir) -> Result<Process> {
        let socket = run.path().join("kvmmemd.sock");
        let mut command = Command::new(bed.bin("kvmmemd"));
        command.arg("--socket").arg(&socket).env("RUST_LOG", "info,audit=off");
        let log = run.path().join("kvmmemd.log");
        let mut broker = Process::start("kvmmemd", &mut command, &log)?;
        wait::until(|| Ok(socket.exists() || !broker.is_running()))?;
        if !socket.exists() {
            bail!("kvmmemd does not come up:\n{}", crate::vm::tail(&log));
        }
        Ok(broker)
    }

    /// Boots what does not run, starts the marker in the target and opens a KVMI session to it.
    pub(crate) fn mend(&mut self) -> Result<()> {
        if self.target.as_mut().is_some_and(|vm| !vm.process.is_running()) {
            (self.target, self.marker, self.session) = (None, None, None);
        }
        if self.introspector.as_mut().is_some_and(|vm| !vm.process.is_running()) {
            self.introspector = None;
        }
        let mut specs = Vec::new();
        if self.target.is_none() {
            specs.push(TARGET_SPEC);
        }
        if self.introspector.is_none() {
            // The doorbell is tried with several vCPUs.
            let vcpus = if self.way == Way::Port { 2 } else { 1 };
            specs.push(Spec { way: self.way, vcpus, ..INTROSPECTOR_SPEC });
        }
        let start = Instant::now();
        let booted = Vm::boot(&self.bed, &specs, &self.socket(), self.run.path())?;
        for vm in &booted {
            eprintln!("  booted {} ({:.1} s)", vm.spec.name, start.elapsed().as_secs_f64());
        }
        for vm in booted {
            match vm.spec.role {
                Role::Target => self.target = Some(vm),
                Role::Introspector => self.introspector = Some(vm),
            }
        }
        if self.marker.is_none() {
            self.marker = Some(self.place_marker(&self.target()?.agent, 64)?);
        }
        if self.session.is_none() {
            self.session = Some(self.open_session()?);
        }
        Ok(())
    }

    /// Ends the broker without warning and starts another one in its place.
    pub(crate) fn restart_broker(&mut self) -> Result<()> {
        if self.broker.is_running() {
            self.broker.kill()?;
        }
        let _ = std::fs::remove_file(self.socket());
        self.session = None;
        self.broker = Self::start_broker(&self.bed, &self.run)?;
        Ok(())
    }

    /// Whether the broker soon knows `count` VMs.
    pub(crate) fn wait_for_vms(&self, count: usize) -> Result<bool> {
        wait::until(|| Ok(self.targets()?.len() == count))
    }

    /// The VMs that the broker knows.
    pub(crate) fn targets(&self) -> Result<Vec<TargetInfo>> {
        self.admin()?.targets().context("the broker lists nothing")
    }

    /// Whether the broker knows a VM of this name.
    pub(crate) fn has(&self, name: &str) -> Result<bool> {
        Ok(self.targets()?.iter().any(|vm| vm.identity.name == name))
    }

    /// The UUID of the VM of this name.
    pub(crate) fn uuid(&self, name: &str) -> Result<Uuid> {
        let vm = self.targets()?.into_iter().find(|vm| vm.identity.name == name);
        Ok(vm.with_context(|| format!("the broker knows no {name}"))?.identity.uuid)
    }

    /// Ends all VMs and starts another broker, after a scenario that left them in an unknown state;
    /// [`World::mend`] boots new VMs.
    pub(crate) fn renew(&mut self) -> Result<()> {
        // The VMs first: their ends are then all that tools in them wait for.
        (self.target, self.introspector) = (None, None);
        self.qemus.clear();
        self.marker = None;
        self.restart_broker()
    }

    /// Ends the introspector where its hypercalls go another way; [`World::mend`] boots one for
    /// which they go this way.
    pub(crate) fn use_way(&mut self, way: Way) {
        if self.way != way {
            self.way = way;
            self.introspector = None;
        }
    }

    /// Starts the marker in a VM that has the probe.
    pub(crate) fn place_marker(&self, agent: &Agent, pages: usize) -> Result<Marker> {
        let command = GuestCommand::new(PROBE).args(["marker", "--pages", &pages.to_string()]);
        let mut child = agent.spawn(&command)?;
        let line = match child.read_line(PATIENCE) {
            Ok(line) => line,
            Err(error) => bail!("the marker is silent ({error}): {}", child.take_stderr()),
        };
        let Some(TargetReport::Marker { gpas, marker }) = line
            .as_deref()
            .map(serde_json::from_str)
            .transpose()
            .context("the marker says nonsense")?
        else {
            bail!("the marker did not start: {line:?} {}", child.take_stderr());
        };
        Ok(Marker { child, gpas, hex: marker })
    }

    /// A KVMI session to the target for the scenario itself, which runs on the host: over a unix
    /// socket, so its tokens have no holder.
    fn open_session(&self) -> Result<Session> {
        let path = self.run.path().join("tool.sock");
        let _ = std::fs::remove_file(&path);
        let listener = Listener::bind(&Endpoint::Unix(path.clone()))?;
        self.kvmmem(&["hook", "add", TARGET, &format!("unix:{}", path.display())])?;
        listener.accept(PATIENCE).context("the broker did not call the scenario's tool")
    }

    /// Runs the CLI against this world's broker and wants it to succeed.
    pub(crate) fn kvmmem(&self, arguments: &[&str]) -> Result<String> {
        let output = self.try_kvmmem(arguments)?;
        if !output.status.success() {
            bail!(
                "kvmmem {} failed: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs the CLI against this world's broker.
    pub(crate) fn try_kvmmem(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(self.bed.bin("kvmmem"));
        command.args(arguments).arg("--broker").arg(self.socket());
        command.output().context("cannot run kvmmem")
    }

    /// A vsock port in the introspector that the target is hooked to from now on.
    pub(crate) fn hook_port(&mut self) -> Result<u32> {
        self.next_port += 1;
        let endpoint = format!("vsock:{}:{}", INTROSPECTOR_SPEC.cid, self.next_port);
        self.kvmmem(&["hook", "add", TARGET, &endpoint])?;
        Ok(self.next_port)
    }

    /// Takes the hook of a port back.
    pub(crate) fn unhook_port(&self, port: u32) -> Result<()> {
        self.kvmmem(&["hook", "remove", TARGET, &format!("vsock:{}:{port}", INTROSPECTOR_SPEC.cid)])
            .map(drop)
    }

    /// The command-driven C tool, run in the introspector by a member of group `kvmmem`.
    pub(crate) fn raw(&self) -> Result<Raw> {
        Raw::start(
            &self.introspector()?.agent,
            &GuestCommand::new(RAW).as_member().memlock(64 << 20),
        )
    }

    /// The same as another user.
    pub(crate) fn raw_as(&self, change: impl FnOnce(GuestCommand) -> GuestCommand) -> Result<Raw> {
        Raw::start(&self.introspector()?.agent, &change(GuestCommand::new(RAW)))
    }

    /// The command-driven C tool for views, run in the introspector by a member of group `kvmmem`.
    pub(crate) fn viewer(&self) -> Result<Raw> {
        Raw::start(&self.introspector()?.agent, &GuestCommand::new(VIEW).as_member())
    }

    /// The same as root.
    pub(crate) fn root_viewer(&self) -> Result<Raw> {
        Raw::start(&self.introspector()?.agent, &GuestCommand::new(VIEW))
    }

    /// The broker, as its operator sees it.
    pub(crate) fn admin(&self) -> Result<Admin> {
        Admin::connect(&self.socket()).context("cannot reach the broker")
    }

    /// A grant on the target: one use, ten minutes, for every bearer of the token.
    pub(crate) fn grant(&self, rights: Rights, spans: Option<Vec<Span>>) -> Result<NewGrant> {
        self.grant_as(|request| GrantRequest { rights, spans, ..request })
    }

    /// A grant on the target that differs from the usual one, which is read-only and for all RAM.
    pub(crate) fn grant_as(
        &self,
        change: impl FnOnce(GrantRequest) -> GrantRequest,
    ) -> Result<NewGrant> {
        let usual = GrantRequest {
            target: TARGET.to_owned(),
            spans: None,
            rights: Rights::ReadOnly,
            ttl_ms: 600_000,
            uses: 1,
            holder: None,
            label: None,
        };
        self.admin()?.grant(&change(usual)).context("the broker grants nothing")
    }

    /// Takes a grant back.
    pub(crate) fn revoke(&self, grant: u64) -> Result<RevokeReport> {
        self.admin()?.revoke(grant).context("the broker revokes nothing")
    }

    /// A fresh token that maps any page once, as four words.
    pub(crate) fn token(&self) -> Result<[u64; 4]> {
        Ok(self.grant(Rights::ReadWrite, None)?.token.words())
    }

    /// The same by KVMI. It expires after three seconds, which a slow machine may need to bring it
    /// to its use.
    pub(crate) fn kvmi_token(&mut self) -> Result<[u64; 4]> {
        Ok(self.session()?.map_token()?.words())
    }

    /// Whether the target's program finds `value` in its inbox next. What was reported of it before
    /// is passed over.
    pub(crate) fn inbox(&mut self, value: u64) -> Result<bool> {
        let end = Instant::now() + PATIENCE;
        let child = &mut self.marker()?.child;
        while let Some(line) = child.read_line(end.saturating_duration_since(Instant::now()))? {
            if serde_json::from_str(&line).ok() == Some(TargetReport::Inbox { value }) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(crate) fn session(&mut self) -> Result<&mut Session> {
        self.session.as_mut().context("no session")
    }

    /// The frame after the last one that the target has.
    pub(crate) fn max_gfn(&mut self) -> Result<u64> {
        Ok(self.session()?.max_gfn()?)
    }

    pub(crate) fn target(&self) -> Result<&Vm> {
        self.target.as_ref().context("no target")
    }

    pub(crate) fn target_mut(&mut self) -> Result<&mut Vm> {
        self.target.as_mut().context("no target")
    }

    pub(crate) fn introspector(&self) -> Result<&Vm> {
        self.introspector.as_ref().context("no introspector")
    }

    pub(crate) fn introspector_mut(&mut self) -> Result<&mut Vm> {
        self.introspector.as_mut().context("no introspector")
    }

    pub(crate) fn agent(&self) -> Result<&Agent> {
        Ok(&self.introspector()?.agent)
    }

    pub(crate) fn marker(&mut self) -> Result<&mut Marker> {
        self.marker.as_mut().context("no marker")
    }

    /// Address of the marker's first page in the target.
    pub(crate) fn gpa(&self) -> Result<u64> {
        self.marker.as_ref().and_then(|marker| marker.gpas.first().copied()).context("no marker")
    }

    pub(crate) fn broker_id(&self) -> u32 {
        self.broker.id()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.run.path().join("kvmmemd.sock")
    }

    /// The ends of all logs, for a failure. A VMM that has only its first thread left is ending,
    /// and prints the reason last: this waits for it.
    pub(crate) fn logs(&mut self) -> String {
        let broker = crate::vm::tail(&self.run.path().join("kvmmemd.log"));
        let mut text =
            format!("--- kvmmemd\n{broker}\n--- threads of kvmmemd\n{}", self.broker.threads());
        for vm in [&mut self.target, &mut self.introspector].into_iter().flatten() {
            let threads = vm.process.threads();
            text += &format!("--- threads of {}\n{threads}", vm.spec.name);
            if !threads.contains("vcpu") {
                let ended = vm.process.wait(PATIENCE);
                text += &format!("--- end of {}: {ended:?}\n", vm.spec.name);
            }
        }
        for name in [TARGET, INTROSPECTOR] {
            for kind in ["log", "console"] {
                let path = self.run.path().join(format!("{name}.{kind}"));
                text += &format!("\n--- {name} {kind}\n{}", crate::vm::tail(&path));
            }
        }
        text += &self.qemu_logs();
        text
    }
}

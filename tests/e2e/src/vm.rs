// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtual machine of the test bed: a `kvmmem vm` process and the agent inside.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvmmem_guest::Agent;

use crate::process::Process;
use crate::test_bed::TestBed;

/// How long a guest may take to boot, under software emulation inside software emulation.
const BOOT_LIMIT: Duration = Duration::from_secs(480);

/// The guests' kernel command line. What follows `panic` makes them quicker on an emulated host.
pub(crate) const CMDLINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr cryptomgr.notests nowatchdog \
    rdinit=/init kvmmem.role=agent";

/// What a VM is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Its memory is looked at.
    Target,
    /// It looks.
    Introspector,
}

/// How an introspector's hypercalls reach its VMM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// As the host can: Xen's interception, else the doorbell port.
    Auto,
    /// The doorbell port.
    Port,
}

/// What to boot.
#[derive(Clone, Copy)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) role: Role,
    pub(crate) cid: u32,
    pub(crate) vcpus: u8,
    pub(crate) way: Way,
    /// Kept when it is booted again, as management tools do.
    pub(crate) uuid: &'static str,
}

/// A running VM, killed when dropped.
pub(crate) struct Vm {
    pub(crate) spec: Spec,
    pub(crate) agent: Agent,
    pub(crate) process: Process,
    log: PathBuf,
    console: PathBuf,
}

impl Vm {
    /// Starts the VMM without waiting for the guest.
    fn launch(bed: &TestBed, spec: Spec, socket: &Path, run: &Path) -> Result<Process> {
        let console = run.join(format!("{}.console", spec.name));
        let log = run.join(format!("{}.log", spec.name));
        let _ = std::fs::remove_file(&console);
        let _ = std::fs::remove_file(&log);
        let mut command = Command::new(bed.bin("kvmmem"));
        command.arg("vm").arg("--kernel").arg(bed.kernel());
        command.args(["--cmdline", CMDLINE]);
        command.args([
            "--name", spec.name, "--uuid", spec.uuid, "--memory", "256M", "--reset", "exit",
            "--json",
        ]);
        command.args(["--cpus", &spec.vcpus.to_string(), "--cid", &spec.cid.to_string()]);
        command.arg("--serial").arg(format!("file:{}", console.display()));
        command.arg("--broker").arg(socket);
        match spec.role {
            Role::Target => {
                command.arg("--initrd").arg(bed.target_initrd()).arg("--introspectable")
            }
            Role::Introspector => {
                command.arg("--initrd").arg(bed.introspector_initrd()).arg("--introspector");
                command.args(["--hypercalls", if spec.way == Way::Port { "port" } else { "auto" }])
            }
        };
        Process::start(spec.name, &mut command, &log)
    }

    /// Boots the VMs of `specs` side by side and waits until each one's agent answers.
    pub(crate) fn boot(
        bed: &TestBed,
        specs: &[Spec],
        socket: &Path,
        run: &Path,
    ) -> Result<Vec<Self>> {
        let started = specs
            .iter()
            .map(|spec| Ok((*spec, Self::launch(bed, *spec, socket, run)?)))
            .collect::<Result<Vec<_>>>()?;
        started
            .into_iter()
            .map(|(spec, mut process)| {
                let agent = wait_for_agent(spec.name, spec.cid, &mut process, run)?;
                let file = |kind| run.join(format!("{}.{kind}", spec.name));
                Ok(Self { spec, agent, process, log: file("log"), console: file("console") })
            })
            .collect()
    }

    /// Whether the kernel restricts the VMM's threads as its sandbox requires; and the state of
    /// each.
    pub(crate) fn sandbox(&self) -> Result<(bool, String)> {
        let mut is_so = !self.has_said("the sandbox does not restrict")?;
        let mut detail = String::new();
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.process.id()));
        for task in tasks.context("cannot list the VMM's threads")?.flatten() {
            // One may have ended meanwhile.
            let Ok(status) = std::fs::read_to_string(task.path().join("status")) else { continue };
            let field = |name: &str| {
                let line =
                    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
                line.map(str::trim).unwrap_or_default().to_owned()
            };
            // A worker of the kernel's, such as vhost's, makes no system calls, but has inherited
            // the filter as well.
            is_so &= field("Seccomp") == "2" && field("NoNewPrivs") == "1";
            detail += &format!("{} {} {}, ", field("Name"), field("Seccomp"), field("NoNewPrivs"));
        }
        Ok((is_so, detail))
    }

    /// Whether the VMM printed `text`.
    pub(crate) fn has_said(&self, text: &str) -> Result<bool> {
        Ok(self.last_said(text)?.is_some())
    }

    /// The last line of the VMM's log that has `text`.
    pub(crate) fn last_said(&self, text: &str) -> Result<Option<String>> {
        let bytes = std::fs::read(&self.log).context("cannot read the VMM's log")?;
        let log = String::from_utf8_lossy(&bytes);
        Ok(log.lines().rfind(|line| line.contains(text)).map(str::to_owned))
    }

    /// Whether the guest printed `text` on its console.
    pub(crate) fn has_printed(&self, text: &str) -> Result<bool> {
        let bytes = std::fs::read(&self.console).context("cannot read the guest's console")?;
        Ok(String::from_utf8_lossy(&bytes).contains(text))
    }
}

/// Waits until the agent of a VM that `process` runs answers, or that ends, or the limit for
/// booting is over. Its console and log are named after it, in the folder `run`.
pub(crate) fn wait_for_agent(
    name: &str,
    cid: u32,
    process: &mut Process,
    run: &Path,
) -> Result<Agent> {
    let deadline = Instant::now() + BOOT_LIMIT;
    loop {
        match Agent::connect(cid, Duration::from_secs(2)) {
            Ok(agent) => return Ok(agent),
            Err(_) if process.is_running() && Instant::now() < deadline => {}
            Err(error) => bail!(
                "the VM {name} does not answer ({error}); its VMM {}\n--- console\n{}\n--- log\n{}",
                if process.is_running() { "still runs" } else { "has ended" },
                tail(&run.join(format!("{name}.console"))),
                tail(&run.join(format!("{name}.log")))
            ),
        }
    }
}

/// The last lines of a log.
pub(crate) fn tail(path: &Path) -> String {
    let text = std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let from = lines.len().saturating_sub(25);
    lines.get(from..).unwrap_or_default().join("\n")
}

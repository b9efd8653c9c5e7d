// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtual machine under a stock QEMU, as Debian has it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use kvmmem_guest::Agent;
use serde_json::{Value, json};

use crate::internal_error;
use crate::process::Process;
use crate::qmp::Qmp;
use crate::test_bed::TestBed;
use crate::vm::{self, CMDLINE};

/// The emulator, in a release's folder.
const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// Devices that no test needs. Each access to them leaves the guest, which is slow in an emulated
/// host.
const QUICK: &str = ",smm=off,hpet=off,vmport=off";

/// Whose QEMU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Release {
    /// Debian 12's: 7.2.
    Bookworm,
    /// Debian 13's backports': 11.1 or later.
    Trixie,
}

impl Release {
    /// Its folder on the test bed's disk.
    fn folder(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }
}

/// What the guest's RAM is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ram {
    /// One shared memfd.
    Memfd,
    /// The same in large pages.
    LargePages,
    /// A shared memfd for each of two NUMA nodes.
    TwoNodes,
    /// QEMU's defaults.
    Private,
}

impl Ram {
    /// The arguments for `mib` MiB of it.
    fn arguments(self, mib: u32) -> Vec<String> {
        let memfd = |id: &str, mib, more: &str| {
            [
                "-object".to_owned(),
                format!("memory-backend-memfd,id={id},size={mib}M,share=on{more}"),
            ]
        };
        let mut arguments = vec!["-m".to_owned(), format!("{mib}M")];
        match self {
            Self::Memfd => arguments.extend(memfd("ram", mib, "")),
            Self::LargePages => arguments.extend(memfd("ram", mib, ",hugetlb=on,hugetlbsize=2M")),
            Self::TwoNodes => {
                for node in ["ram0", "ram1"] {
                    arguments.extend(memfd(node, mib / 2, ""));
                    arguments.extend(["-numa".to_owned(), format!("node,memdev={node}")]);
                }
            }
            Self::Private => {}
        }
        arguments
    }

    /// The arguments for it.
    fn machine(self) -> &'static str {
        if matches!(self, Self::Memfd | Self::LargePages) { ",memory-backend=ram" } else { "" }
    }
}

/// What to boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) release: Release,
    /// `pc` or `q35`.
    pub(crate) machine: &'static str,
    pub(crate) mib: u32,
    pub(crate) ram: Ram,
    pub(crate) cid: u32,
    /// RAM of the largest target that it is to look at, as `kvmmem qemu-args` reads it.
    pub(crate) largest: &'static str,
    /// The Debian release whose kernel it boots, without the module; otherwise the test bed's own,
    /// with it.
    pub(crate) kernel: Option<&'static str>,
}

/// A running VM, killed when dropped. Its guest has the module, so that it can look as well as be
/// looked at.
pub(crate) struct Qemu {
    pub(crate) spec: Spec,
    pub(crate) agent: Agent,
    pub(crate) process: Process,
    run: PathBuf,
}

impl Qemu {
    /// Boots a VM and waits until its agent answers.
    pub(crate) fn boot(bed: &TestBed, spec: Spec, run: &Path) -> Result<Self> {
        let root = bed.qemus()?.join(spec.release.folder());
        let file = |kind: &str| run.join(format!("{}.{kind}", spec.name));
        for kind in ["console", "log", "qmp", "test.qmp", "watch.qmp"] {
            let _ = std::fs::remove_file(file(kind));
        }
        // The program itself enters the folder: std's chroot is safe only there.
        let mut command = Command::new(std::env::current_exe().context("no path of this program")?);
        command.arg("enter").arg(root).arg(PROGRAM);
        command.args(["-name", spec.name, "-accel", "kvm", "-cpu", "host", "-smp", "1"]);
        command.args(["-machine", &format!("{}{QUICK}{}", spec.machine, spec.ram.machine())]);
        command.args(spec.ram.arguments(spec.mib));
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        let (kernel, initrd) = match spec.kernel {
            Some(release) => bed.stock_kernel(release)?,
            None => (bed.kernel(), bed.introspector_initrd()),
        };
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
        command.args([
            "-append",
            CMDLINE,
            "-serial",
            &format!("file:{}", file("console").display()),
        ]);
        command.args(introspector_arguments(bed, spec, &file("qmp"))?);
        // A socket has one client at a time: these are the scenarios' own.
        for kind in ["test.qmp", "watch.qmp"] {
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", file(kind).display())]);
        }
        let mut process = Process::start(spec.name, &mut command, &file("log"))?;
        let agent = vm::wait_for_agent(spec.name, spec.cid, &mut process, run)?;
        internal_error::watch(&file("watch.qmp"))?;
        Ok(Self { spec, agent, process, run: run.to_owned() })
    }

    /// The QMP socket that is for the broker.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run.join(format!("{}.qmp", self.spec.name))
    }

    /// One command on the scenarios' own QMP socket.
    pub(crate) fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        Qmp::connect(&self.run.join(format!("{}.test.qmp", self.spec.name)))?
            .execute(command, arguments)
    }

    /// The version that it prints.
    pub(crate) fn version(&self) -> Result<String> {
        let version = self.qmp("query-version", &json!({}))?;
        let part = |name: &str| version["qemu"][name].as_u64().unwrap_or_default();
        Ok(format!("{}.{}.{}", part("major"), part("minor"), part("micro")))
    }
}

/// How many PCI slots for views the introspectors have.
pub(crate) const VIEWS: usize = 2;

/// The output of `kvmmem qemu-args` for an introspector: slots for views, vsock, the broker's QMP
/// socket.
fn introspector_arguments(bed: &TestBed, spec: Spec, socket: &Path) -> Result<Vec<String>> {
    let output = Command::new(bed.bin("kvmmem"))
        .args(["qemu-args", "--json", "--machine", spec.machine, "--memory", spec.largest])
        .args(["--views", &VIEWS.to_string(), "--cid", &spec.cid.to_string(), "--qmp"])
        .arg(socket)
        .output()
        .context("cannot run kvmmem")?;
    let words: Value =
        serde_json::from_slice(&output.stdout).context("kvmmem qemu-args says nonsense")?;
    serde_json::from_value(words["arguments"].clone()).context("kvmmem qemu-args says no arguments")
}

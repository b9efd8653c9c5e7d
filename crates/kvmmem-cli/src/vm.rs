// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem vm`: runs a virtual machine, a target or an introspector or neither.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use kvmmem_proto::name::is_name;
use kvmmem_vmm::{
    Control, DiskConfig, HypercallMethod, MAX_DISKS, MAX_VCPUS, ResetPolicy, SerialConfig,
    VmConfig, VmExit, VmStatus,
};
use uuid::Uuid;

use crate::escape::escape;
use crate::failure::usage;
use crate::number::{integer, parse, parse_uuid};
use crate::output::Output;

/// Exit code of a machine whose CPU shut down.
const TRIPLE_FAULT: u8 = 3;

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// The kernel: a bzImage (vmlinuz) or a 64-bit ELF file (vmlinux)
    #[arg(long, value_name = "PATH")]
    kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    cmdline: String,
    /// Size of RAM
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_memory)]
    memory: u64,
    /// Number of virtual CPUs
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = integer(1..=MAX_VCPUS))]
    cpus: u8,
    /// A raw disk image, read-only with `,ro` behind it; may be given again
    #[arg(long = "disk", value_name = "PATH[,ro]", value_parser = parse_disk)]
    disks: Vec<DiskConfig>,
    /// Context id of a vsock device; introspectors get their tokens over it
    #[arg(long, value_parser = integer(3..=u32::MAX - 1))]
    cid: Option<u32>,
    /// Where the serial port leads: stdio, file:PATH or none [default: stdio, or none with --json]
    #[arg(long, value_name = "WHERE", value_parser = parse_serial)]
    serial: Option<SerialConfig>,
    /// Name, as the broker's clients see it [default: vm- and the process id]
    #[arg(long, value_parser = parse_name)]
    name: Option<String>,
    /// UUID, as the broker's clients see it [default: a random one]
    #[arg(long, value_parser = parse_uuid)]
    uuid: Option<Uuid>,
    /// Socket of the broker, kvmmemd [default: none, or the usual one for targets and
    /// introspectors]
    #[arg(long, value_name = "PATH")]
    broker: Option<PathBuf>,
    /// Let introspectors look at this machine's memory
    #[arg(long)]
    introspectable: bool,
    /// Let this machine look at others' memory
    #[arg(long)]
    introspector: bool,
    /// How an introspector's hypercalls reach the host
    #[arg(long, value_enum, default_value_t = Method::Auto, requires = "introspector")]
    hypercalls: Method,
    /// Offer v1 (single pages) only: no views, and no windows of guest-physical memory
    #[arg(long, requires = "introspector")]
    no_window: bool,
    /// Keep rights that the machine does not need: for debugging, or where the sandbox is in the
    /// way
    #[arg(long)]
    no_sandbox: bool,
    /// What a reset by the guest does
    #[arg(long, value_enum, default_value_t = Reset::Restart)]
    reset: Reset,
}

const AFTER_HELP: &str = "\
With the serial port on a terminal, Ctrl-A x ends the machine; SIGINT and SIGTERM end it too.

Exit codes:
  0  the guest powered off, the machine was stopped, or reset with --reset exit
  1  failed, standard error says why
  2  the command line is wrong
  3  the guest's CPU shut down (triple fault)";

#[derive(Clone, Copy, ValueEnum)]
enum Method {
    /// By vmcall where the host's KVM can forward it, else by port
    Auto,
    /// By vmcall, forwarded by KVM's Xen support
    Xen,
    /// By an I/O port
    Port,
}

#[derive(Clone, Copy, ValueEnum)]
enum Reset {
    /// The machine starts anew
    Restart,
    /// The machine ends
    Exit,
}

impl Arguments {
    pub(crate) fn run(self, output: &mut Output) -> Result<ExitCode> {
        let is_json = output.is_json();
        let config = self.into_config(is_json)?;
        let name = config.name.clone();
        let control =
            Control::new().handle_signals().on_status(move |status| report(status, &name, is_json));
        let exit = kvmmem_vmm::run(config, control).context("the virtual machine failed")?;
        Ok(match exit {
            VmExit::PowerOff | VmExit::Reset | VmExit::Stopped => ExitCode::SUCCESS,
            VmExit::TripleFault => ExitCode::from(TRIPLE_FAULT),
        })
    }

    fn into_config(self, is_json: bool) -> Result<VmConfig> {
        let serial = match self.serial {
            Some(SerialConfig::Stdio) if is_json => {
                return Err(usage(
                    "--serial stdio and --json both want standard output: use --serial file:PATH or none",
                ));
            }
            Some(serial) => serial,
            None if is_json => SerialConfig::None,
            None => SerialConfig::Stdio,
        };
        if self.disks.len() > MAX_DISKS {
            let count = self.disks.len();
            return Err(usage(format!(
                "{count} disks are too many: a machine has at most {MAX_DISKS}"
            )));
        }
        for (option, path) in [("--kernel", Some(&self.kernel)), ("--initrd", self.initrd.as_ref())]
        {
            if let Some(path) = path {
                check_readable(option, path)?;
            }
        }
        for disk in &self.disks {
            check_readable("--disk", &disk.path)?;
        }
        let needs_broker = self.introspectable || self.introspector;
        Ok(VmConfig {
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            memory_bytes: self.memory,
            vcpus: self.cpus,
            disks: self.disks,
            cid: self.cid,
            serial,
            name: self.name.unwrap_or_else(|| format!("vm-{}", std::process::id())),
            uuid: self.uuid.unwrap_or_else(random_uuid).into_bytes(),
            broker: self.broker.or_else(|| needs_broker.then(kvmmem::view::default_socket)),
            introspectable: self.introspectable,
            introspector: self.introspector,
            hypercalls: match self.hypercalls {
                Method::Auto => HypercallMethod::Auto,
                Method::Xen => HypercallMethod::Xen,
                Method::Port => HypercallMethod::Port,
            },
            window: !self.no_window,
            reset: match self.reset {
                Reset::Restart => ResetPolicy::Restart,
                Reset::Exit => ResetPolicy::Exit,
            },
            sandbox: !self.no_sandbox,
        })
    }
}

/// Prints what happens to the machine: JSON on standard output, or a line on standard error.
fn report(status: &VmStatus, name: &str, is_json: bool) {
    // The machine keeps running if this cannot be written.
    let _ = if is_json {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{}", status.to_json()).and_then(|()| stdout.flush())
    } else {
        let text = match status {
            VmStatus::Started { .. } => "started",
            VmStatus::Restarted => "reset, and started anew",
            VmStatus::Exited { reason } => match reason {
                VmExit::PowerOff => "powered off",
                VmExit::Reset => "reset",
                VmExit::TripleFault => "its CPU shut down (triple fault)",
                VmExit::Stopped => "stopped",
            },
        };
        writeln!(io::stderr(), "{}: {text}", escape(name))
    };
}

fn check_readable(option: &str, path: &Path) -> Result<()> {
    std::fs::File::open(path)
        .with_context(|| format!("cannot read {} (from {option})", path.display()))
        .map(drop)
}

/// A UUID of version 4.
fn random_uuid() -> Uuid {
    let mut bytes = [0; 16];
    // Without randomness, which a running kernel always has, the UUID is all zeros but for its
    // version.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

fn parse_memory(text: &str) -> Result<u64, String> {
    match parse(text)? {
        0 => Err("a machine needs memory".into()),
        bytes if bytes % kvmmem::PAGE_SIZE as u64 != 0 => {
            Err("the size is not a multiple of 4096 bytes".into())
        }
        bytes => Ok(bytes),
    }
}

fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let (path, read_only) = text.strip_suffix(",ro").map_or((text, false), |path| (path, true));
    if path.is_empty() {
        Err("the path is missing".into())
    } else {
        Ok(DiskConfig { path: path.into(), read_only })
    }
}

fn parse_serial(text: &str) -> Result<SerialConfig, String> {
    match text {
        "stdio" => Ok(SerialConfig::Stdio),
        "none" => Ok(SerialConfig::None),
        _ => match text.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Ok(SerialConfig::File(path.into())),
            _ => Err("write stdio, none or file:PATH".into()),
        },
    }
}

fn parse_name(text: &str) -> Result<String, String> {
    if !is_name(text) {
        return Err("a name has 1 to 63 bytes, all of them to be shown".into());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        assert_eq!(parse_memory("256M"), Ok(256 << 20));
        assert_eq!(parse_serial("file:a b"), Ok(SerialConfig::File("a b".into())));
        let disk = parse_disk("a,b,ro").unwrap();
        assert_eq!((disk.path, disk.read_only), ("a,b".into(), true));
        assert!(!parse_disk("a.img").unwrap().read_only);
    }

    #[test]
    fn bad_options_are_refused() {
        assert!(parse_memory("0").is_err() && parse_memory("4097").is_err());
        assert!(parse_serial("file:").is_err() && parse_serial("tty").is_err());
        assert!(parse_disk(",ro").is_err());
        let long = "x".repeat(64);
        for name in ["", "a\nb", &long] {
            assert!(parse_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn random_uuids_differ_and_say_that_they_are_random() {
        let (one, other) = (random_uuid(), random_uuid());
        assert_ne!(one, other);
        assert_eq!(one.get_version_num(), 4);
    }
}

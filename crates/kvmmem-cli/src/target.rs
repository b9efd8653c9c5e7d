// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs that can be looked at: `target list`, `target add`, `target remove`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use kvmmem_client::admin::{Evidence, NewTarget, Region, TargetInfo, Which};
use serde::Serialize;

use crate::broker::Broker;
use crate::escape::escape;
use crate::failure::usage;
use crate::number::{Hex, integer};
use crate::output::Output;
use crate::registered;

#[derive(Args)]
pub(crate) struct Target {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List the targets.
    List {
        #[command(flatten)]
        broker: Broker,
    },
    /// Make a running virtual machine a target, without stopping or changing it (root only).
    ///
    /// RAM that is shared and in sealed files, as QEMU's memory-backend-memfd,share=on makes it,
    /// can be mapped; any other is copied, for tools on the host alone: `kvmmem host discover`
    /// prints what to add. With --qmp the layout of the RAM comes from QEMU; without it from the
    /// rules of the machine type.
    Add(Add),
    /// Remove a target that was added; the virtual machine runs on (root only).
    Remove(Remove),
}

#[derive(Args)]
struct Add {
    #[command(flatten)]
    running: RunningVm,
    #[command(flatten)]
    broker: Broker,
}

/// A running virtual machine that is to be added.
#[derive(Args)]
pub(crate) struct RunningVm {
    #[command(flatten)]
    by: By,
    /// Process id of its QEMU, alone or for a QMP socket that another process made
    #[arg(long, conflicts_with = "libvirt", value_parser = integer(1..=u32::MAX))]
    pid: Option<u32>,
    /// What to call it [default: as its QEMU does]
    #[arg(long)]
    pub(crate) name: Option<String>,
}

#[derive(Args)]
#[group(required = false, multiple = false)]
struct By {
    /// QMP socket of its QEMU, for the broker alone
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// Name in libvirt: in its system daemon, or in this user's session
    #[arg(long, value_name = "NAME")]
    libvirt: Option<String>,
}

impl RunningVm {
    /// Which one it is.
    pub(crate) fn which(&self) -> Result<Which> {
        Ok(match (&self.by.qmp, &self.by.libvirt, self.pid) {
            (Some(socket), _, pid) => {
                // The broker has another working directory.
                let socket =
                    std::path::absolute(socket).context("cannot find the working directory")?;
                Which::Qmp { socket, pid }
            }
            (None, Some(name), _) => Which::Libvirt(name.clone()),
            (None, None, Some(pid)) => Which::Pid(pid),
            (None, None, None) => return Err(usage("say which one: --pid, --qmp or --libvirt")),
        })
    }
}

#[derive(Args)]
struct Remove {
    /// Name or UUID of the target
    target: String,
    #[command(flatten)]
    broker: Broker,
}

/// What was added, as JSON.
#[derive(Serialize)]
struct AddedLine<'a> {
    target: &'a TargetInfo,
    regions: Vec<RegionLine>,
    evidence: Evidence,
    copied: Option<&'a str>,
}

/// A part of its RAM, as JSON.
#[derive(Serialize)]
struct RegionLine {
    gpa: Hex,
    len: u64,
    offset: Hex,
    file: u32,
}

impl From<&Region> for RegionLine {
    fn from(region: &Region) -> Self {
        let Region { gpa, len, offset, file } = *region;
        Self { gpa: Hex(gpa), len, offset: Hex(offset), file }
    }
}

/// What was removed, as JSON.
#[derive(Serialize)]
struct RemovedLine<'a> {
    target: &'a str,
    removed: bool,
}

impl Target {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        match &self.verb {
            Verb::List { broker } => list(broker, output)?,
            Verb::Add(add) => add.run(output)?,
            Verb::Remove(remove) => remove.run(output)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn list(broker: &Broker, output: &mut Output) -> Result<()> {
    let mut targets = broker.connect()?.targets().context("cannot list the targets")?;
    targets.retain(|target| target.identity.introspectable);
    if output.is_json() {
        targets.iter().try_for_each(|target| output.object(target))?;
    } else if targets.is_empty() {
        output
            .line("there are no targets: kvmmem host discover lists the VMs that can be added")?;
    } else {
        registered::lines(&targets).into_iter().try_for_each(|line| output.line(line))?;
    }
    Ok(())
}

impl Add {
    fn run(&self, output: &mut Output) -> Result<()> {
        let which = self.running.which()?;
        let added = self.broker.connect()?.add_target(&which, self.running.name.as_deref());
        let NewTarget { target, regions, evidence, copied } =
            added.context("cannot add the target")?;
        if output.is_json() {
            let copied = copied.as_deref();
            let regions = regions.iter().map(Into::into).collect();
            output.object(&AddedLine { target: &target, regions, evidence, copied })?;
            return Ok(());
        }
        let how = match evidence {
            Evidence::Qmp => "as QEMU says",
            Evidence::RulesAndAcpi => {
                "by its machine type, and confirmed by the guest's ACPI tables"
            }
            Evidence::RulesAndBootMap => {
                "by its VMM, and confirmed by the memory map that the guest was started with"
            }
        };
        output.line(format!(
            "{} ({}) is a target; RAM {how}:",
            escape(&target.identity.name),
            target.identity.uuid
        ))?;
        for region in regions {
            output.line(format!(
                "  {:#x}..{:#x}",
                region.gpa,
                region.gpa.saturating_add(region.len)
            ))?;
        }
        if let Some(copied) = copied {
            output.line(escape(&copied))?;
        }
        Ok(())
    }
}

impl Remove {
    fn run(&self, output: &mut Output) -> Result<()> {
        let target = &self.target;
        self.broker
            .connect()?
            .remove_target(target)
            .with_context(|| format!("cannot remove {target:?}"))?;
        if output.is_json() {
            output.object(&RemovedLine { target, removed: true })?;
        } else {
            output.line(format!("{} is no longer a target", escape(target)))?;
        }
        Ok(())
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtual machines that run already, under VMMs that do not register them: `targets --discover`,
//! `target add`, `target remove`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use kvmmem_client::admin::{Added, Evidence, Region, TargetInfo, Which};
use kvmmem_qemu::discover::{Found, discover};
use serde::Serialize;

use crate::broker::Broker;
use crate::failure::{escape, usage};
use crate::number::Hex;
use crate::output::{Output, columns};
use crate::shell::quote;

#[derive(Args)]
pub(crate) struct Target {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make a running virtual machine a target, without stopping or changing it (root only).
    ///
    /// RAM that is shared and in sealed files, as QEMU's memory-backend-memfd,share=on makes it,
    /// can be mapped; any other is copied, for tools on the host alone: `kvmmem targets
    /// --discover` says what to add where it is not. With --qmp QEMU says where the RAM lies;
    /// without it the machine type's rules do.
    Add(Add),
    /// Take a target out that was added; the virtual machine runs on (root only).
    Remove(Remove),
}

#[derive(Args)]
struct Add {
    #[command(flatten)]
    running: Running,
    #[command(flatten)]
    broker: Broker,
}

/// A running virtual machine that is to be added.
#[derive(Args)]
pub(crate) struct Running {
    #[command(flatten)]
    by: By,
    /// Process id of its QEMU, alone or for a QMP socket that another process made
    #[arg(long, conflicts_with = "libvirt")]
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
    /// Name by which libvirt's system daemon knows it
    #[arg(long, value_name = "NAME")]
    libvirt: Option<String>,
}

impl Running {
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
            Verb::Add(add) => add.run(output)?,
            Verb::Remove(remove) => remove.run(output)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Add {
    fn run(&self, output: &mut Output) -> Result<()> {
        let which = self.running.which()?;
        let added = self.broker.connect()?.add_target(&which, self.running.name.as_deref());
        let Added { target, regions, evidence, copied } = added.context("cannot add the target")?;
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
            escape(&target.name),
            target.uuid
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
            output.line(format!("{} is no target any more", escape(target)))?;
        }
        Ok(())
    }
}

/// `targets --discover`: what runs here, and what of it can be added. Needs no broker, but one
/// tells what was added.
pub(crate) fn list_found(broker: &Broker, output: &mut Output) -> Result<()> {
    let found = discover().context("cannot look for virtual machines in /proc")?;
    let known =
        broker.connect().ok().and_then(|mut broker| broker.targets().ok()).unwrap_or_default();
    let is_known =
        |found: &Found| known.iter().any(|target| target.introspectable && target.pid == found.pid);
    if output.is_json() {
        for found in &found {
            output.object(&FoundLine { found, target: is_known(found) })?;
        }
    } else if found.is_empty() {
        output.line("no virtual machine runs here, or none that this user can see")?;
    } else {
        for line in table(&found, is_known) {
            output.line(line)?;
        }
    }
    Ok(())
}

/// What was found, as JSON.
#[derive(Serialize)]
struct FoundLine<'a> {
    #[serde(flatten)]
    found: &'a Found,
    /// Whether the broker has it already.
    target: bool,
}

/// What was found as aligned columns, with what is in the way, and what helps, below.
fn table(all: &[Found], is_known: impl Fn(&Found) -> bool) -> Vec<String> {
    let header = ["PID", "VMM", "NAME", "VCPUS", "MEMORY", "MACHINE", "TARGET"].map(str::to_owned);
    let text = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), escape);
    let row = |found: &Found| {
        [
            found.pid.to_string(),
            found.vmm.name().to_owned(),
            text(&found.name),
            found.vcpus.map_or_else(|| "-".to_owned(), |vcpus| vcpus.to_string()),
            found
                .memory_bytes
                .map_or_else(|| "-".to_owned(), |bytes| format!("{} MiB", bytes >> 20)),
            text(&found.machine),
            match (is_known(found), found.attachable) {
                (true, _) => "is one".to_owned(),
                (false, true) => "can be added".to_owned(),
                (false, false) => "no".to_owned(),
            },
        ]
    };
    let rows: Vec<[String; 7]> = std::iter::once(header).chain(all.iter().map(row)).collect();
    let mut lines = columns(&rows).into_iter();
    let mut table: Vec<String> = lines.next().into_iter().collect();
    for (line, found) in lines.zip(all) {
        table.push(line);
        if is_known(found) {
            continue;
        }
        if let Some(qmp) = found.qmp.as_ref().filter(|_| found.attachable) {
            table.push(format!("  kvmmem target add --qmp {}", quote(qmp)));
        } else if found.attachable {
            table.push(format!("  kvmmem target add --pid {}", found.pid));
        }
        if let Some(reason) = &found.reason {
            table.push(format!("  {}", escape(reason)));
        }
        if let Some(remedy) = &found.remedy {
            table.push(format!("  add: {}", escape(remedy)));
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use kvmmem_qemu::command_line::Vmm;

    use super::*;

    #[test]
    fn the_table_says_what_to_do_and_cannot_drive_the_terminal() {
        let found = |pid, qmp: Option<&str>, reason: Option<&str>| Found {
            pid,
            vmm: Vmm::Qemu,
            name: Some("a\x1bb".to_owned()),
            uuid: None,
            vcpus: Some(2),
            memory_bytes: Some(512 << 20),
            machine: Some("q35".to_owned()),
            qmp: qmp.map(Into::into),
            attachable: reason.is_none(),
            copied: false,
            reason: reason.map(str::to_owned),
            remedy: reason.map(|_| "share=on".to_owned()),
        };
        let all = [
            found(7, None, None),
            found(8, Some("/run/q s;.sock"), None),
            found(9, None, Some("its RAM is private")),
            found(10, None, None),
        ];
        let lines = table(&all, |found| found.pid == 10);
        assert_eq!(
            lines,
            [
                "PID  VMM   NAME      VCPUS  MEMORY   MACHINE  TARGET",
                "7    QEMU  a\\u{1b}b  2      512 MiB  q35      can be added",
                "  kvmmem target add --pid 7",
                "8    QEMU  a\\u{1b}b  2      512 MiB  q35      can be added",
                "  kvmmem target add --qmp '/run/q s;.sock'",
                "9    QEMU  a\\u{1b}b  2      512 MiB  q35      no",
                "  its RAM is private",
                "  add: share=on",
                "10   QEMU  a\\u{1b}b  2      512 MiB  q35      is one",
            ]
        );
    }
}

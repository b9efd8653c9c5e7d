// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The VMs of this host: `host discover`. Needs no broker; a running one adds which VMs are
//! targets.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use kvmmem_qemu::discover::{HostVm, discover};
use serde::Serialize;

use crate::broker::Broker;
use crate::escape::escape;
use crate::number::mebibytes;
use crate::output::{Output, columns};
use crate::shell::quote;

#[derive(Args)]
pub(crate) struct Host {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List the virtual machines that run on this host, under any VMM, and which can be added.
    Discover {
        #[command(flatten)]
        broker: Broker,
    },
}

impl Host {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let Verb::Discover { broker } = &self.verb;
        discover_vms(broker, output)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn discover_vms(broker: &Broker, output: &mut Output) -> Result<()> {
    let found = discover().context("cannot look for virtual machines in /proc")?;
    let known =
        broker.connect().ok().and_then(|mut broker| broker.targets().ok()).unwrap_or_default();
    let is_known = |found: &HostVm| {
        known.iter().any(|target| target.identity.introspectable && target.pid == found.pid)
    };
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
    found: &'a HostVm,
    /// Whether the broker has it already.
    target: bool,
}

/// What was found as aligned columns, with what is in the way, and what helps, below.
fn table(all: &[HostVm], is_known: impl Fn(&HostVm) -> bool) -> Vec<String> {
    let header = ["PID", "VMM", "NAME", "VCPUS", "MEMORY", "MACHINE", "TARGET"].map(str::to_owned);
    let text = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), escape);
    let row = |found: &HostVm| {
        [
            found.pid.to_string(),
            found.vmm.name().to_owned(),
            text(&found.name),
            found.vcpus.map_or_else(|| "-".to_owned(), |vcpus| vcpus.to_string()),
            found.memory_bytes.map_or_else(|| "-".to_owned(), mebibytes),
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
    use kvmmem_qemu::vmm::Vmm;

    use super::*;

    #[test]
    fn the_table_says_what_to_do_and_cannot_drive_the_terminal() {
        let found = |pid, qmp: Option<&str>, reason: Option<&str>| HostVm {
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

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem info --all`: a row for each virtual machine of this host.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context, Result};
use kvmmem_linux::Kernel;
use kvmmem_linux::identity::Identity;
use kvmmem_linux::tasks::{Tasks, Which};
use kvmmem_qemu::discover::discover;
use serde::Serialize;

use crate::broker::Broker;
use crate::escape::escape;
use crate::linux::{Guest, collect};
use crate::output::{Output, columns};
use crate::target_name::TargetName;

/// A virtual machine, as JSON.
#[derive(Serialize)]
struct MachineLine {
    name: Option<String>,
    pid: u32,
    #[serde(flatten)]
    kernel: Option<KernelLine>,
    /// Why the rest is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Its kernel.
#[derive(Serialize)]
struct KernelLine {
    release: String,
    host_name: String,
    uptime_ms: Option<u64>,
    processes: usize,
}

pub(super) fn run(output: &mut Output) -> Result<ExitCode> {
    let found = machines()?;
    let is_empty = found.is_empty();
    let lines = found.into_iter().map(|(pid, name)| look(pid, name));
    if output.is_json() {
        for line in lines {
            output.object(&line)?;
        }
    } else if is_empty {
        output.line("no virtual machine runs here, or none that this user can see")?;
    } else {
        for line in table(&lines.collect::<Vec<_>>()) {
            output.line(line)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Process ids and names of the VMs that run here; those that the broker has go by their names
/// there.
fn machines() -> Result<BTreeMap<u32, Option<String>>> {
    let found = discover().context("cannot look for virtual machines in /proc")?;
    let mut machines: BTreeMap<_, _> =
        found.into_iter().map(|found| (found.pid, found.name)).collect();
    let targets = Broker::default().connect().ok().and_then(|mut broker| broker.targets().ok());
    for target in targets.unwrap_or_default() {
        if target.identity.introspectable {
            machines.insert(target.pid, Some(target.identity.name));
        }
    }
    Ok(machines)
}

fn look(pid: u32, name: Option<String>) -> MachineLine {
    let found = Guest::of_target(TargetName::Pid(pid)).with_kernel("info", KernelLine::new);
    let (kernel, error) = match found {
        Ok(kernel) => (Some(kernel), None),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    MachineLine { name, pid, kernel, error }
}

impl KernelLine {
    fn new(kernel: &Kernel<'_>) -> Result<Self> {
        let identity = Identity::of(kernel)?;
        let processes = collect(|| Tasks::new(kernel, Which::Processes))
            .context("cannot list the processes")?;
        Ok(Self {
            release: identity.release,
            host_name: identity.host_name,
            uptime_ms: identity
                .uptime
                .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            processes: processes.rows.len() + processes.lost,
        })
    }
}

/// The rows, and below them why some have no kernel.
fn table(machines: &[MachineLine]) -> Vec<String> {
    let header = ["NAME", "PID", "KERNEL", "HOST NAME", "UPTIME", "PROCESSES"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(header).chain(machines.iter().map(row)).collect();
    let errors = std::iter::once(None).chain(machines.iter().map(|machine| machine.error.as_ref()));
    let mut lines = Vec::new();
    for (line, error) in columns(&rows).into_iter().zip(errors) {
        lines.push(line);
        lines.extend(error.map(|error| format!("  {}", escape(error))));
    }
    lines
}

fn row(machine: &MachineLine) -> [String; 6] {
    let none = || "-".to_owned();
    let kernel = machine.kernel.as_ref();
    let uptime = kernel.and_then(|kernel| kernel.uptime_ms);
    [
        machine.name.as_deref().map_or_else(none, escape),
        machine.pid.to_string(),
        kernel.map_or_else(none, |kernel| escape(&kernel.release)),
        kernel.map_or_else(none, |kernel| escape(&kernel.host_name)),
        uptime.map_or_else(none, |ms| format!("{}.{:02} s", ms / 1000, ms % 1000 / 10)),
        kernel.map_or_else(none, |kernel| kernel.processes.to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_cannot_be_read_has_a_row_with_the_reason() {
        let kernel = KernelLine {
            release: "6.12.1".to_owned(),
            host_name: "a\x1b".to_owned(),
            uptime_ms: Some(61_230),
            processes: 71,
        };
        let machines = [
            MachineLine {
                name: Some("web-1".to_owned()),
                pid: 7,
                kernel: Some(kernel),
                error: None,
            },
            MachineLine {
                name: None,
                pid: 80,
                kernel: None,
                error: Some("no Linux kernel\n".to_owned()),
            },
        ];
        let expected = [
            "NAME   PID  KERNEL  HOST NAME  UPTIME   PROCESSES",
            "web-1  7    6.12.1  a\\u{1b}    61.23 s  71",
            "-      80   -       -          -        -",
            "  no Linux kernel\\n",
        ];
        assert_eq!(table(&machines), expected);
        let json = |machine| serde_json::to_value(machine).unwrap();
        assert_eq!(json(&machines[0])["processes"], 71);
        assert!(json(&machines[1])["release"].is_null() && json(&machines[1])["error"].is_string());
    }
}

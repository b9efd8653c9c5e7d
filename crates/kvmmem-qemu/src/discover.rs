// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lists the VMMs that run on this host.

use std::io;
use std::path::PathBuf;

use serde::Serialize;
use uuid::Uuid;

use crate::attach::supported;
use crate::backing;
use crate::command_line::CommandLine;
use crate::layout;
use crate::mapping::Mapping;
use crate::obstacle::Obstacle;
use crate::process::{Process, ProcessError};
use crate::recognise;
use crate::vmm::Vmm;

/// A VMM that runs on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostVm {
    /// Its process.
    pub pid: u32,
    /// Which one it is.
    pub vmm: Vmm,
    /// What its command line calls the VM.
    pub name: Option<String>,
    /// UUID of the VM.
    pub uuid: Option<Uuid>,
    /// Number of vCPUs.
    pub vcpus: Option<u32>,
    /// RAM, bytes.
    pub memory_bytes: Option<u64>,
    /// QEMU's machine type.
    pub machine: Option<String>,
    /// QEMU's QMP socket, as the command line has it.
    pub qmp: Option<PathBuf>,
    /// Whether the RAM can be opened; where it lies in the guest is found out when it is attached.
    pub attachable: bool,
    /// Whether its memory can only be copied, not mapped.
    pub copied: bool,
    /// Why not, or why only that.
    pub reason: Option<String>,
    /// What to start the VM with instead.
    pub remedy: Option<String>,
}

/// The VMMs of this host, by ascending process id. What has ended meanwhile is left out.
///
/// # Errors
/// Where `/proc` cannot be read.
pub fn discover() -> io::Result<Vec<HostVm>> {
    let entries = std::fs::read_dir("/proc")?;
    let mut pids: Vec<u32> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    Ok(pids.into_iter().filter_map(find).collect())
}

fn find(pid: u32) -> Option<HostVm> {
    let process = Process::open(pid).ok()?;
    let arguments = process
        .arguments()
        .ok()
        .filter(|arguments| arguments.iter().any(|word| !word.is_empty()))?;
    let program = match process.program() {
        // Who may not know what it runs has only its word.
        Err(ProcessError::Denied(_)) => arguments.first()?.rsplit('/').next()?.to_owned(),
        program => program.ok()?,
    };
    let vmm = recognise::recognise(&process, &program, &arguments).ok()??;
    let line = CommandLine::parse(vmm, &arguments);
    let (copied, obstacle) = match openable(&process, vmm, &line) {
        Ok(copied) => (copied, None),
        Err(obstacle) => (None, Some(obstacle)),
    };
    if matches!(obstacle, Some(Obstacle::Process(ProcessError::Gone(_)))) || !process.is_alive() {
        return None;
    }
    let in_the_way = copied.as_ref().or(obstacle.as_ref());
    let reason = in_the_way.map(ToString::to_string);
    Some(HostVm {
        pid,
        vmm,
        attachable: obstacle.is_none(),
        copied: copied.is_some(),
        reason: reason.map(|reason| {
            if copied.is_some() { format!("{reason}; it is copied, not mapped") } else { reason }
        }),
        remedy: in_the_way.and_then(|obstacle| obstacle.remedy(&line)),
        name: line.name,
        uuid: line.uuid,
        vcpus: line.vcpus,
        memory_bytes: line.memory,
        machine: line.machine,
        qmp: line.qmp,
    })
}

/// Whether the RAM can be opened, and why it can only be copied where that is so.
fn openable(process: &Process, vmm: Vmm, line: &CommandLine) -> Result<Option<Obstacle>, Obstacle> {
    supported(vmm)?;
    backing::check(process, line)?;
    let mappings = process.mappings()?;
    let layouts: Vec<Vec<u64>> = match vmm {
        Vmm::Qemu => line.sizes().into_iter().collect(),
        // A size that is not on the command line is asked for when the VM is attached.
        _ => line
            .memory
            .map(|size| layout::of_micro(vmm, size))
            .unwrap_or_default()
            .into_iter()
            .map(|layout| layout.sizes)
            .collect(),
    };
    let mut missing = None;
    for sizes in &layouts {
        match held(process, &mappings, sizes) {
            Err(obstacle @ Obstacle::NotFound(_)) => missing = missing.or(Some(obstacle)),
            found => return found,
        }
    }
    missing.map_or(Ok(None), Err)
}

/// Whether there is memory of all these sizes, and why it can only be copied where that is so.
fn held(
    process: &Process,
    mappings: &[Mapping],
    sizes: &[u64],
) -> Result<Option<Obstacle>, Obstacle> {
    let mut reason = None;
    for size in sizes {
        let candidates = backing::candidates(mappings, *size, sizes);
        if candidates.is_empty() {
            return Err(Obstacle::NotFound(*size));
        }
        let copied = candidates
            .iter()
            .map(|backing| backing.copied(process))
            .collect::<Result<Vec<_>, _>>()?;
        if copied.iter().all(Option::is_some) {
            reason = reason.or_else(|| copied.into_iter().flatten().next());
        }
    }
    Ok(reason)
}

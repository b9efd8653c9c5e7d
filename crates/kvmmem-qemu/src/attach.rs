// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opens the RAM of a VM that runs under a stock QEMU, and finds out where it lies.

use std::os::fd::OwnedFd;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::map::Region;
use kvmmem_proto::message::{Evidence, VmIdentity, Which};
use uuid::Uuid;

use super::api;
use super::backing::{self, Ram, Source};
use super::command_line::CommandLine;
use super::confirm::{self, By, ConfirmError, EvidenceError};
use super::find::{self, Connect, FindError};
use super::layout::{self, Layout, LayoutError};
use super::mtree::{self, MtreeError};
use super::obstacle::Obstacle;
use super::process::{Process, ProcessError};
use super::recognise::recognise;
use super::vmm::Vmm;
use crate::qmp::{Qmp, QmpError};

/// A VM whose RAM is open.
#[derive(Debug)]
pub struct ExternalVm {
    /// What it is registered as.
    pub identity: VmIdentity,
    /// Where its RAM is.
    pub regions: Vec<Region>,
    /// Its RAM.
    pub source: Source,
    /// Why its memory can only be copied, and what helps, where that is so.
    pub copied: Option<String>,
    /// Its VMM.
    pub credentials: Credentials,
    /// Becomes readable when the VMM ends.
    pub pidfd: OwnedFd,
    /// How the layout became known.
    pub evidence: Evidence,
    /// The QMP connection by which it did.
    pub qmp: Option<Qmp>,
}

/// A VM's RAM, open, and where it lies in the guest.
pub struct Memory {
    /// Its files or private memory.
    pub ram: Ram,
    /// Why its memory can only be copied, and what helps, where that is so.
    pub copied: Option<String>,
    /// How the layout became known.
    pub evidence: Evidence,
}

/// Why a VM is not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is no such process or QMP socket.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The process is not a VMM.
    #[error(
        "process {pid} runs {program:?}, which is not a VMM that kvmmem knows, by its name, its options and its memory; see kvmmem host discover"
    )]
    NoVmm {
        /// The process.
        pid: u32,
        /// File name of its program.
        program: String,
    },
    /// The process ended while it was looked at.
    #[error("process {0} has ended")]
    Ended(u32),
    /// The VM cannot be attached.
    #[error("{obstacle}{}", remedy.as_ref().map(|remedy| format!("; start it with: {remedy}")).unwrap_or_default())]
    Obstacle {
        /// Why not.
        obstacle: Obstacle,
        /// What helps.
        remedy: Option<String>,
    },
    /// The process cannot be looked at.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// QEMU does not answer.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU's memory tree makes no sense.
    #[error(transparent)]
    Mtree(#[from] MtreeError),
    /// It is not known where the RAM lies.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The guest's memory does not confirm where the RAM lies.
    #[error(
        "the layout by the rules is not confirmed by the guest's memory; wait until the guest has started, or give QEMU's QMP socket"
    )]
    Unconfirmed(#[source] EvidenceError),
    /// There are no random numbers for a UUID.
    #[error("cannot make a UUID")]
    Random(#[source] getrandom::Error),
}

/// Looks at a QEMU's memory, before its answers are taken for wrong: they contradict each other
/// where memory is plugged in or out between two questions.
const LOOKS: u32 = 4;

/// Opens the RAM of a VM; `called` is what it shall be called, `connect` gets its QMP connection.
pub fn open(
    which: &Which,
    called: Option<String>,
    connect: Connect<'_>,
) -> Result<ExternalVm, AttachError> {
    let (process, mut qmp) = find::process(which, connect)?;
    let (pid, line) = (process.pid(), command_line(&process)?);
    find::check_name(which, pid, line.name.clone())?;
    let Memory { ram: Ram { regions, source }, copied, evidence } =
        look(&process, &line, qmp.as_mut())?;
    let vcpus = match &mut qmp {
        Some(qmp) => qmp.vcpus()?,
        None => line.vcpus.unwrap_or(1),
    };
    let identity = VmIdentity {
        name: called.or_else(|| line.name.clone()).unwrap_or_else(|| format!("vm-{pid}")),
        uuid: line
            .uuid
            .or_else(|| derived_uuid(&process))
            .map_or_else(random_uuid, Ok)
            .map_err(AttachError::Random)?,
        vcpus,
        start_time_ms: process.start_time_ms().unwrap_or(0),
        cid: None,
        introspectable: true,
        introspector: false,
    };
    let credentials = Credentials { pid, uid: process.uid()? };
    // What was read so far belongs to this process, and not to a later one with its number.
    if !process.is_alive() {
        return Err(AttachError::Ended(pid));
    }
    let pidfd = process.into_pidfd();
    Ok(ExternalVm { identity, regions, source, copied, credentials, pidfd, evidence, qmp })
}

/// The command line of a VMM whose VMs can be attached.
pub fn command_line(process: &Process) -> Result<CommandLine, AttachError> {
    let (pid, arguments, program) = (process.pid(), process.arguments()?, process.program()?);
    let vmm =
        recognise(process, &program, &arguments)?.ok_or(AttachError::NoVmm { pid, program })?;
    let line = CommandLine::parse(vmm, &arguments);
    supported(vmm).map_err(|obstacle| stopped(&line, obstacle))?;
    Ok(line)
}

/// Finds a VM's RAM, and where it lies in the guest: by what QEMU says, or by rules that the guest
/// confirms.
pub fn look(
    process: &Process,
    line: &CommandLine,
    mut qmp: Option<&mut Qmp>,
) -> Result<Memory, AttachError> {
    for _ in 1..LOOKS {
        match look_once(process, line, qmp.as_deref_mut()) {
            Err(AttachError::Mtree(_) | AttachError::Layout(_) | AttachError::Obstacle { .. })
                if qmp.is_some() => {}
            result => return result,
        }
    }
    look_once(process, line, qmp)
}

fn look_once(
    process: &Process,
    line: &CommandLine,
    qmp: Option<&mut Qmp>,
) -> Result<Memory, AttachError> {
    let stopped = |obstacle| stopped(line, obstacle);
    backing::check(process, line).map_err(stopped)?;
    let mappings = process.mappings()?;
    let (layout, backings, evidence) = match qmp {
        Some(qmp) => {
            let layout = ask(qmp, line)?;
            let backings = ask_places(qmp, &layout)?
                .into_iter()
                .map(|(hva, size)| backing::at(&mappings, hva, size));
            (layout, backings.collect::<Result<_, _>>().map_err(stopped)?, Evidence::Qmp)
        }
        None => {
            let (layouts, by, evidence) = match line.vmm {
                Some(vmm @ (Vmm::CloudHypervisor | Vmm::Firecracker)) => {
                    (of_micro(vmm, process, line)?, By::BootMap, Evidence::RulesAndBootMap)
                }
                _ => (vec![by_rules(line)?], By::Acpi, Evidence::RulesAndAcpi),
            };
            let (layout, backings) = confirm::choose_layout(process, &mappings, layouts, by)
                .map_err(|error| match error {
                    ConfirmError::Obstacle(obstacle) => stopped(obstacle),
                    ConfirmError::Unconfirmed(error) => AttachError::Unconfirmed(error),
                })?;
            (layout, backings, evidence)
        }
    };
    let ram = backing::hold(process, &layout.regions, &backings).map_err(stopped)?;
    // What was opened must not be the memory of another program that the process executes
    // meanwhile.
    if command_line(process)? != *line {
        return Err(AttachError::Ended(process.pid()));
    }
    let copied = match &ram.source {
        Source::Files(_) => None,
        Source::Process { reason, .. } => Some(reason.as_copied(line)),
    };
    Ok(Memory { ram, copied, evidence })
}

fn stopped(line: &CommandLine, obstacle: Obstacle) -> AttachError {
    AttachError::Obstacle { remedy: obstacle.remedy(line), obstacle }
}

/// Whether VMs of a VMM can be attached at all.
pub(crate) fn supported(vmm: Vmm) -> Result<(), Obstacle> {
    match vmm {
        Vmm::Qemu | Vmm::CloudHypervisor | Vmm::Firecracker => Ok(()),
        Vmm::Kvmmem => Err(Obstacle::RegistersItself),
        Vmm::Crosvm => Err(Obstacle::Unsupported(vmm)),
    }
}

/// The layout that QEMU says.
fn ask(qmp: &mut Qmp, line: &CommandLine) -> Result<Layout, AttachError> {
    let (backends, devices, memory) =
        (qmp.memory_backends()?, qmp.memory_devices()?, qmp.memory_size()?);
    let view = mtree::parse(&qmp.memory_tree()?)?;
    Ok(layout::from_qemu(&view, &backends, &devices, memory, &line.nodes)?)
}

/// Where QEMU says that each backend is in its address space, and the backend's size.
fn ask_places(qmp: &mut Qmp, layout: &Layout) -> Result<Vec<(u64, u64)>, AttachError> {
    let mut places = Vec::new();
    for (file, size) in (0..).zip(&layout.sizes) {
        let region = layout.regions.iter().find(|region| region.file == file);
        let region = region.ok_or(LayoutError::NoRegion(file))?;
        // What is below the beginning of all addresses is found nowhere.
        let hva = qmp.host_address(region.gpa)?.checked_sub(region.offset).unwrap_or(u64::MAX);
        places.push((hva, *size));
    }
    Ok(places)
}

/// The layout by the machine type's rules.
fn by_rules(line: &CommandLine) -> Result<Layout, AttachError> {
    let size = line.memory.unwrap_or(0);
    if line.is_growable {
        return Err(LayoutError::Growable.into());
    }
    let sizes = line.sizes().ok_or(LayoutError::Nodes)?;
    // QEMU's default machine.
    let machine = line.machine.as_deref().unwrap_or("pc");
    let low_end = layout::low_end(machine, size, line.max_ram_below_4g)?;
    Ok(layout::by_rules(low_end, sizes))
}

/// The layouts that a VMM without a chipset may have. How much RAM there is stands on the command
/// line, or it is asked.
fn of_micro(vmm: Vmm, process: &Process, line: &CommandLine) -> Result<Vec<Layout>, AttachError> {
    if line.is_growable {
        return Err(LayoutError::Growable.into());
    }
    let asked = || api::memory(vmm, &process.path_of(line.api.as_deref()?), process.uid().ok()?);
    let size = line.memory.or_else(asked).ok_or(LayoutError::Size)?;
    Ok(layout::of_micro(vmm, size))
}

/// For a VM whose command line has none: the same one whenever this process is added.
fn derived_uuid(process: &Process) -> Option<Uuid> {
    let identity = process.identity()?;
    Some(uuid::Builder::from_custom_bytes(*identity.first_chunk()?).into_uuid())
}

/// For a VM without anything that identifies it over restarts.
pub fn random_uuid() -> Result<Uuid, getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}

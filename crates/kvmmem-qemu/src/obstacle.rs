// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a VM cannot be attached as it runs, or why its memory can only be copied; and what helps.

use rustix::io::Errno;

use super::command_line::{CommandLine, in_units};
use super::process::ProcessError;
use super::vmm::Vmm;

/// What attaching costs a user of libvirt.
const LIBVIRT_REMEDY: &str =
    "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";

/// Firecracker puts its guest's memory in a sealed memfd as soon as another process serves a drive.
const FIRECRACKER_REMEDY: &str =
    "a drive of kind vhost-user-block (\"socket\" in the drive's configuration)";

/// Why a VM cannot be attached as it runs, or why its memory can only be copied.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// `kvmmem vm` tells the broker by itself.
    #[error("kvmmem vm registers its VM by itself")]
    RegistersItself,
    /// The layouts of this VMM are not known.
    #[error("the memory layout of {} is not known to kvmmem", .0.name())]
    Unsupported(Vmm),
    /// The host cannot read the guest's memory.
    #[error("the guest's memory is confidential ({0})")]
    Confidential(String),
    /// No mapping of the VMM is the RAM.
    #[error("its process has no memory of {} that could be RAM", in_units(*.0))]
    NotFound(u64),
    /// The VMM has nothing where it says that RAM is.
    #[error("its process has no memory of {} at {hva:#x}, where it says that RAM is", in_units(*.size))]
    NotThere {
        /// The address in its process.
        hva: u64,
        /// How much should be there, bytes.
        size: u64,
    },
    /// Two mappings could be the same part of the RAM.
    #[error("which of several mappings of {} is which part of the RAM is not known; give QEMU's QMP socket", in_units(*.0))]
    Ambiguous(u64),
    /// The RAM is private: no other process can map it.
    #[error("its RAM is private: no file of {} is mapped shared", in_units(*.0))]
    Private(u64),
    /// The RAM's file may be cut off under those who map it.
    #[error("its RAM's file {0} is not sealed against shrinking")]
    Unsealed(String),
    /// The file is mapped and not open.
    #[error("its RAM's file {0} cannot be opened")]
    NotOpen(String),
    /// The file cannot be looked at.
    #[error("its RAM's file cannot be examined")]
    Examine(#[source] Errno),
    /// The process cannot be looked at.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

impl Obstacle {
    /// What to add to the VMM's command line, or to libvirt's XML, where that helps.
    pub fn remedy(&self, line: &CommandLine) -> Option<String> {
        match self {
            Self::Private(_) | Self::Unsealed(_) => match line.vmm? {
                Vmm::Qemu if line.is_libvirts => Some(LIBVIRT_REMEDY.to_owned()),
                Vmm::Qemu => Some(qemu_remedy(line)),
                Vmm::Firecracker => Some(FIRECRACKER_REMEDY.to_owned()),
                // Cloud Hypervisor shares its memory where it is told to, and never seals it.
                _ => None,
            },
            Self::RegistersItself => Some("--introspectable".to_owned()),
            _ => None,
        }
    }

    /// What it means where memory can be copied nevertheless.
    pub fn as_copied(&self, line: &CommandLine) -> String {
        let remedy =
            self.remedy(line).map(|remedy| format!("; to have it mapped, start it with: {remedy}"));
        format!("{self}; it is copied, not mapped{}", remedy.unwrap_or_default())
    }

    /// Whether memory can be copied nevertheless.
    pub(crate) fn is_of_mapping(&self) -> bool {
        matches!(self, Self::Private(_) | Self::Unsealed(_) | Self::NotOpen(_))
    }
}

fn qemu_remedy(line: &CommandLine) -> String {
    let backend = |id: &str, size| {
        format!("-object memory-backend-memfd,id={id},size={},share=on", in_units(size))
    };
    let of_node = |id: &String| Some(backend(id, *line.backends.get(id)?));
    match line.nodes.iter().map(of_node).collect::<Option<Vec<_>>>() {
        Some(nodes) if !nodes.is_empty() => nodes.join(" "),
        _ => format!("{} -machine memory-backend=mem", backend("mem", line.memory.unwrap_or(0))),
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file of a VM's RAM, as the kernel shows it: a shared mapping of the VMM that covers all of a file of the RAM's
//! size.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use rustix::fs::SealFlags;
use rustix::io::Errno;

use super::command_line::{CommandLine, Vmm, in_units};
use super::process::{FileId, Process, ProcessError};

/// What attaching costs a user of libvirt.
const LIBVIRT_REMEDY: &str = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";

/// Why a VM cannot be attached as it runs.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// `kvmmem vm` tells the broker by itself.
    #[error("kvmmem vm registers its VM by itself")]
    RegistersItself,
    /// Nobody has taught the broker this VMM.
    #[error("the memory layout of {} is not known to kvmmem", .0.name())]
    Unsupported(Vmm),
    /// The host cannot read the guest's memory.
    #[error("the guest's memory is confidential ({0})")]
    Confidential(String),
    /// The RAM is nobody else's to map.
    #[error("its RAM is private: no file of {} is mapped shared", in_units(*.0))]
    Private(u64),
    /// The RAM is in more files than one.
    #[error("its RAM is in {0} files; only one is supported")]
    Several(usize),
    /// Two files could be the RAM.
    #[error("{count} files of {} are mapped shared; which one is the RAM is not known", in_units(*.size))]
    Ambiguous {
        /// How many.
        count: usize,
        /// Their size, bytes.
        size: u64,
    },
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

/// The file of a VM's RAM.
#[derive(Debug)]
pub struct Backing {
    /// The file, open for reading and writing.
    pub file: OwnedFd,
}

impl Obstacle {
    /// What to add to the VMM's command line, or to libvirt's XML, where that helps.
    pub fn remedy(&self, line: &CommandLine) -> Option<String> {
        match self {
            Self::Private(_) | Self::Several(_) | Self::Unsealed(_) if line.is_libvirts => {
                Some(LIBVIRT_REMEDY.to_owned())
            }
            Self::Private(size) => Some(qemu_remedy(*size)),
            Self::Several(_) | Self::Unsealed(_) => Some(qemu_remedy(line.memory.unwrap_or(0))),
            Self::RegistersItself => Some("--introspectable".to_owned()),
            _ => None,
        }
    }
}

fn qemu_remedy(size: u64) -> String {
    let size = in_units(size);
    format!("-object memory-backend-memfd,id=mem,size={size},share=on -machine memory-backend=mem")
}

/// Finds the RAM of `size` bytes and opens it.
///
/// # Errors
/// [`Obstacle`].
pub fn find(process: &Process, line: &CommandLine, size: u64) -> Result<Backing, Obstacle> {
    if let Some(technology) = &line.confidential {
        return Err(Obstacle::Confidential(technology.clone()));
    }
    let is_guest_memfd = |link: &str| link.contains("[kvm-gmem]") || link.contains("[guest_memfd]");
    if process.find_link(is_guest_memfd)?.is_some() {
        return Err(Obstacle::Confidential("guest_memfd".to_owned()));
    }
    let mut files: BTreeMap<FileId, (u64, String)> = BTreeMap::new();
    for mapping in process.mappings()? {
        let Some((id, offset)) = mapping.shared_file() else { continue };
        let file = files.entry(id).or_insert((0, mapping.path));
        // Of a file that is mapped twice no more counts than is mapped at all.
        if offset == file.0 {
            file.0 = file.0.saturating_add(mapping.len);
        }
    }
    let mut candidates = files.iter().filter(|(_, (mapped, _))| *mapped == size);
    let Some((id, (_, path))) = candidates.next() else {
        let parts =
            files.values().filter(|(mapped, _)| *mapped < size && line.shared_backends.contains(mapped));
        return Err(match parts.count() {
            parts @ 2.. => Obstacle::Several(parts),
            _ => Obstacle::Private(size),
        });
    };
    match candidates.count() {
        0 => {}
        others => return Err(Obstacle::Ambiguous { count: others + 1, size }),
    }
    let file = process.open_file(*id)?.ok_or_else(|| Obstacle::NotOpen(path.clone()))?;
    let stat = rustix::fs::fstat(&file).map_err(Obstacle::Examine)?;
    let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
    if !seals.contains(SealFlags::SHRINK) || u64::try_from(stat.st_size) != Ok(size) {
        return Err(Obstacle::Unsealed(path.clone()));
    }
    Ok(Backing { file })
}

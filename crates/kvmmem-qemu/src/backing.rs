// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What holds a VM's RAM, as the kernel shows it: mappings of the VMM, and the files behind them.
//!
//! RAM that is shared and in files that cannot shrink can be mapped by others. All other RAM can
//! only be copied, by way of the VMM's own address space: a process that maps a file which is then
//! truncated gets SIGBUS where there was memory, and an introspector's VMM would die of its
//! target's doing.

use std::os::fd::OwnedFd;

use kvmmem_proto::map::Region;
use rustix::fs::SealFlags;

use super::command_line::CommandLine;
use super::file_id::FileId;
use super::mapping::{self, Mapping};
use super::obstacle::Obstacle;
use super::process::Process;

/// A part of the VMM's address space that is a part of the RAM: what QEMU calls a memory backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// First address, in the VMM's process.
    pub hva: u64,
    /// Length, bytes.
    pub len: u64,
    /// The file, where it is shared, and the place in it of the first byte.
    pub shared: Option<(FileId, u64)>,
    /// What the kernel calls the mapping.
    pub path: String,
}

/// RAM that is open, and where it lies.
#[derive(Debug)]
pub struct Ram {
    /// Where guest-physical memory is: in the files by their numbers, or at which addresses of the
    /// process.
    pub regions: Vec<Region>,
    /// The RAM.
    pub source: Source,
}

/// What RAM is read from.
#[derive(Debug)]
pub enum Source {
    /// Files, open for reading and writing, that cannot shrink.
    Files(Vec<OwnedFd>),
    /// The VMM's memory, `/proc/PID/mem`.
    Process {
        /// The open file.
        memory: OwnedFd,
        /// Why there is no other way.
        reason: Obstacle,
    },
}

impl Source {
    /// Which files the RAM is in; none where it is private.
    pub fn file_ids(&self) -> Vec<FileId> {
        match self {
            Self::Files(files) => files.iter().filter_map(FileId::of_file).collect(),
            Self::Process { .. } => Vec::new(),
        }
    }
}

/// Whether the host can read the guest's memory at all.
///
/// # Errors
/// [`Obstacle::Confidential`], [`Obstacle::Process`].
pub fn check(process: &Process, line: &CommandLine) -> Result<(), Obstacle> {
    if let Some(technology) = &line.confidential {
        return Err(Obstacle::Confidential(technology.clone()));
    }
    let is_guest_memfd = |link: &str| link.contains("[kvm-gmem]") || link.contains("[guest_memfd]");
    match process.find_link(is_guest_memfd)? {
        Some(_) => Err(Obstacle::Confidential("guest_memfd".to_owned())),
        None => Ok(()),
    }
}

/// What could be a part of the RAM with `size` bytes, each file once: mappings of that length, and
/// where parts of these `sizes` that follow each other fill a mapping, those. (The kernel merges
/// private mappings that happen to be neighbours, and those of one file, be it in the order of the
/// parts or, as it places the next mapping below the last, the other way round.)
pub fn candidates(mappings: &[Mapping], size: u64, sizes: &[u64]) -> Vec<Backing> {
    let whole = mappings.iter().filter(|mapping| mapping.len == size);
    let whole = whole.map(|mapping| Backing::of(mapping, mapping.hva, size));
    let sum = sizes.iter().try_fold(0u64, |sum, size| sum.checked_add(*size));
    let merged = mappings.iter().filter(|mapping| sizes.len() > 1 && sum == Some(mapping.len));
    let parts = merged.flat_map(|mapping| {
        let parts = [parts(mapping, sizes.iter()), parts(mapping, sizes.iter().rev())];
        parts.into_iter().flatten().filter(|part| part.len == size)
    });
    let mut found: Vec<Backing> = Vec::new();
    for backing in whole.chain(parts) {
        let is_same = |other: &Backing| {
            if backing.shared.is_some() {
                other.shared == backing.shared
            } else {
                other.hva == backing.hva
            }
        };
        if !found.iter().any(is_same) {
            found.push(backing);
        }
    }
    found
}

/// The parts of a mapping with these sizes, which make it up.
fn parts<'a>(mapping: &Mapping, sizes: impl Iterator<Item = &'a u64>) -> Vec<Backing> {
    let mut hva = mapping.hva;
    let part = |size: &u64| {
        let part = Backing::of(mapping, hva, *size);
        hva = hva.saturating_add(*size);
        part
    };
    sizes.map(part).collect()
}

/// What is at an address of the VMM's.
///
/// # Errors
/// [`Obstacle::NotThere`].
pub fn at(mappings: &[Mapping], hva: u64, size: u64) -> Result<Backing, Obstacle> {
    let mapping = mapping::covering(mappings, hva, size).ok_or(Obstacle::NotThere { hva, size })?;
    Ok(Backing::of(mapping, hva, size))
}

impl Backing {
    /// Whether it has an address in common with another one, which is another part of the RAM.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let end = |backing: &Self| backing.hva.saturating_add(backing.len);
        self.hva < end(other) && other.hva < end(self)
    }

    /// `len` bytes at address `hva`, which is in a mapping.
    fn of(mapping: &Mapping, hva: u64, len: u64) -> Self {
        let shared = mapping
            .shared_file()
            .map(|(file, offset)| (file, offset.saturating_add(hva - mapping.hva)));
        Self { hva, len, shared, path: mapping.path.clone() }
    }

    /// Why it can only be copied, if that is so.
    ///
    /// # Errors
    /// Where it cannot even be copied.
    pub fn copied(&self, process: &Process) -> Result<Option<Obstacle>, Obstacle> {
        match self.open(process) {
            Ok(_) => Ok(None),
            Err(reason) if reason.is_of_mapping() => Ok(Some(reason)),
            Err(obstacle) => Err(obstacle),
        }
    }

    /// Opens the file for others to map.
    fn open(&self, process: &Process) -> Result<OwnedFd, Obstacle> {
        let (id, offset) = self.shared.ok_or(Obstacle::Private(self.len))?;
        let file = process.open_file(id)?.ok_or_else(|| Obstacle::NotOpen(self.path.clone()))?;
        let stat = rustix::fs::fstat(&file).map_err(Obstacle::Examine)?;
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        let fits =
            u64::try_from(stat.st_size).is_ok_and(|size| offset.saturating_add(self.len) <= size);
        if fits && seals.contains(SealFlags::SHRINK) {
            return Ok(file);
        }
        Err(Obstacle::Unsealed(self.path.clone()))
    }
}

/// Opens RAM whose regions are in these backings, by their numbers.
///
/// # Errors
/// [`Obstacle`].
pub fn hold(process: &Process, regions: &[Region], backings: &[Backing]) -> Result<Ram, Obstacle> {
    match files(process, regions, backings) {
        Err(reason) if reason.is_of_mapping() => {
            let move_to = |backing: &Backing, region: &Region| {
                Some(Region { offset: backing.hva.checked_add(region.offset)?, file: 0, ..*region })
            };
            let regions = moved(regions, backings, move_to)?;
            Ok(Ram { regions, source: Source::Process { memory: process.memory()?, reason } })
        }
        held => held,
    }
}

/// Opens RAM for others to map.
fn files(process: &Process, regions: &[Region], backings: &[Backing]) -> Result<Ram, Obstacle> {
    let (mut ids, mut files): (Vec<FileId>, Vec<OwnedFd>) = Default::default();
    for backing in backings {
        let id = backing.shared.map(|(id, _)| id);
        if !id.is_some_and(|id| ids.contains(&id)) {
            files.push(backing.open(process)?);
            ids.extend(id);
        }
    }
    let move_to = |backing: &Backing, region: &Region| {
        let (id, offset) = backing.shared?;
        let number = ids.iter().position(|other| *other == id)?;
        let offset = offset.checked_add(region.offset)?;
        Some(Region { offset, file: u32::try_from(number).ok()?, ..*region })
    };
    Ok(Ram { regions: moved(regions, backings, move_to)?, source: Source::Files(files) })
}

/// Regions in backings, by their numbers, as regions elsewhere.
fn moved(
    regions: &[Region],
    backings: &[Backing],
    move_to: impl Fn(&Backing, &Region) -> Option<Region>,
) -> Result<Vec<Region>, Obstacle> {
    let one = |region: &Region| {
        let backing = usize::try_from(region.file).ok().and_then(|number| backings.get(number));
        let fits = |backing: &&Backing| {
            region.offset.checked_add(region.len).is_some_and(|end| end <= backing.len)
        };
        let found = backing.filter(fits).and_then(|backing| move_to(backing, region));
        found.ok_or(Obstacle::NotFound(region.len))
    };
    regions.iter().map(one).collect()
}

#[cfg(test)]
mod tests;

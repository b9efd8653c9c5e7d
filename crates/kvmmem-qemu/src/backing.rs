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
use rustix::io::Errno;

use super::command_line::{CommandLine, Vmm, in_units};
use super::mapping::{self, Mapping};
use super::process::{FileId, Process, ProcessError};

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
    /// Nobody has taught the broker this VMM.
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
pub struct Held {
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
    fn is_of_mapping(&self) -> bool {
        matches!(self, Self::Private(_) | Self::Unsealed(_) | Self::NotOpen(_))
    }
}

fn qemu_remedy(line: &CommandLine) -> String {
    let backend = |id: &str, size| {
        format!("-object memory-backend-memfd,id={id},size={},share=on", in_units(size))
    };
    let of_node =
        |id: &String| Some(backend(id, line.backends.iter().find(|other| other.id == *id)?.size));
    match line.nodes.iter().map(of_node).collect::<Option<Vec<_>>>() {
        Some(nodes) if !nodes.is_empty() => nodes.join(" "),
        _ => format!("{} -machine memory-backend=mem", backend("mem", line.memory.unwrap_or(0))),
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
pub fn hold(process: &Process, regions: &[Region], backings: &[Backing]) -> Result<Held, Obstacle> {
    match files(process, regions, backings) {
        Err(reason) if reason.is_of_mapping() => {
            let move_to = |backing: &Backing, region: &Region| {
                Some(Region { offset: backing.hva.checked_add(region.offset)?, file: 0, ..*region })
            };
            let regions = moved(regions, backings, move_to)?;
            Ok(Held { regions, source: Source::Process { memory: process.memory()?, reason } })
        }
        held => held,
    }
}

/// Opens RAM for others to map.
fn files(process: &Process, regions: &[Region], backings: &[Backing]) -> Result<Held, Obstacle> {
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
    Ok(Held { regions: moved(regions, backings, move_to)?, source: Source::Files(files) })
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
mod tests {
    use super::*;

    const FILE: FileId = FileId { device: 1, inode: 7 };

    fn mapping(hva: u64, len: u64, file: Option<(FileId, u64)>, is_shared: bool) -> Mapping {
        Mapping { hva, len, is_shared, file, path: "/memfd:x".to_owned() }
    }

    fn region(gpa: u64, len: u64, offset: u64, file: u32) -> Region {
        Region { gpa, len, offset, file }
    }

    #[test]
    fn a_file_that_is_mapped_twice_is_one_candidate() {
        let mappings = [
            mapping(0x1_0000, 0x4000, Some((FILE, 0)), true),
            mapping(0x2_0000, 0x4000, Some((FILE, 0)), true),
            mapping(0x3_0000, 0x4000, Some((FILE, 0x4000)), true),
            mapping(0x4_0000, 0x4000, None, false),
            mapping(0x5_0000, 0x4000, Some((FILE, 0)), false),
            mapping(0x6_0000, 0x5000, None, false),
        ];
        let candidates = candidates(&mappings, 0x4000, &[0x4000]);
        let places: Vec<u64> = candidates.iter().map(|backing| backing.hva).collect();
        assert_eq!(places, [0x1_0000, 0x3_0000, 0x4_0000, 0x5_0000]);
        let inner = at(&mappings, 0x3_1000, 0x3000).unwrap();
        assert_eq!(inner.shared, Some((FILE, 0x5000)));
        for (hva, size) in [(0x3_1000, 0x4000), (0, 1), (u64::MAX, u64::MAX)] {
            assert!(matches!(at(&mappings, hva, size), Err(Obstacle::NotThere { .. })));
        }
    }

    #[test]
    fn parts_that_are_one_mapping_are_found_in_either_order() {
        let mappings = [
            mapping(0x10_0000, 0x6000, None, false),
            mapping(0x20_0000, 0x6000, Some((FILE, 0x1000)), true),
            mapping(0x30_0000, 0x7000, None, false),
            mapping(0x40_0000, 0x2000, None, false),
        ];
        let places = |size| {
            let found = candidates(&mappings, size, &[0x4000, 0x2000]);
            assert!(found.iter().all(|backing| backing.len == size));
            found.into_iter().map(|backing| (backing.hva, backing.shared)).collect::<Vec<_>>()
        };
        let shared = |offset| Some((FILE, offset));
        assert_eq!(
            places(0x4000),
            [
                (0x10_0000, None),
                (0x10_2000, None),
                (0x20_0000, shared(0x1000)),
                (0x20_2000, shared(0x3000))
            ]
        );
        assert_eq!(
            places(0x2000),
            [
                (0x40_0000, None),
                (0x10_4000, None),
                (0x10_0000, None),
                (0x20_4000, shared(0x5000)),
                (0x20_0000, shared(0x1000))
            ]
        );
        // Two halves are the same in both orders.
        assert_eq!(candidates(&mappings, 0x3000, &[0x3000, 0x3000]).len(), 4);
        assert_eq!(candidates(&mappings, u64::MAX, &[u64::MAX, 2]), []);
        let [low, high] = [0x10_0000, 0x10_4000].map(|hva| at(&mappings, hva, 0x2000).unwrap());
        assert!(low.overlaps(&low) && !low.overlaps(&high));
        assert!(low.overlaps(&at(&mappings, 0x10_1000, 0x1000).unwrap()));
    }

    #[test]
    fn private_ram_is_at_addresses_of_the_process() {
        let process = Process::open(std::process::id()).unwrap();
        let backing = |hva, len| Backing { hva, len, shared: None, path: String::new() };
        let backings = [backing(0x10_0000, 0x4000), backing(0x20_0000, 0x2000)];
        let regions = [region(0, 0x4000, 0, 0), region(0x4000, 0x1000, 0x1000, 1)];
        let held = hold(&process, &regions, &backings).unwrap();
        assert!(matches!(held.source, Source::Process { reason: Obstacle::Private(0x4000), .. }));
        assert_eq!(
            held.regions,
            [region(0, 0x4000, 0x10_0000, 0), region(0x4000, 0x1000, 0x20_1000, 0)]
        );
        for beyond in
            [region(0, 0x5000, 0, 0), region(0, 0x1000, u64::MAX, 0), region(0, 0x1000, 0, 2)]
        {
            assert!(matches!(hold(&process, &[beyond], &backings), Err(Obstacle::NotFound(_))));
        }
    }
}

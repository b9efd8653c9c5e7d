// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory maps of processes, as /proc/PID/maps shows them (`show_map_vma()` of the kernel).
//!
//! A process's areas (`struct vm_area_struct`) form a list, `mm_struct.mmap`, before Linux 6.1, and
//! a maple tree, `mm_struct.mm_mt`, from then on. In both they ascend: one that does not is an
//! error, so that a loop ends a walk.

mod area;
mod mapping;
mod tree;

use crate::budget::{Budget, LISTING};
use crate::kernel::{Kernel, KernelError};
use crate::tasks::Task;
use area::{Areas, is_page};
pub use mapping::{MappedFile, Mapping};
use tree::{Entry, MAX_AREAS, Tree};

/// What the mappings of all processes together may take: each its size and its path or label, each
/// node of a tree its slots.
const LIMIT: &str = "1 GiB of mappings, or the limit that was set";

/// Walks of a map that changes.
const TRIES: u32 = 3;

/// The mappings of a process, by ascending address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryMap {
    /// The mappings.
    pub mappings: Vec<Mapping>,
    /// Whether they changed during every read, so that some may be missing or may not belong
    /// together.
    pub is_torn: bool,
    /// Whether the list of them is damaged, so that some are missing.
    pub is_cut: bool,
}

impl MemoryMap {
    /// Whether some mappings are missing, or cannot be read whole.
    pub fn is_damaged(&self) -> bool {
        self.is_cut || self.mappings.iter().any(|mapping| mapping.is_damaged)
    }

    /// The mapping that `gva` lies in.
    pub fn find(&self, gva: u64) -> Option<&Mapping> {
        let after = self.mappings.partition_point(|mapping| mapping.end <= gva);
        self.mappings.get(after).filter(|mapping| mapping.start <= gva)
    }
}

/// Where everything is, for the maps of all processes.
#[derive(Debug)]
pub struct Maps<'a> {
    kernel: &'a Kernel<'a>,
    areas: Areas<'a>,
    mm: u64,
    place: Place,
    map_count: u64,
    /// References to the memory of a process, which has one as long as the process has it.
    mm_count: Option<u64>,
    budget: Budget,
}

/// Where a process has its areas.
#[derive(Debug)]
enum Place {
    /// In a list: offsets of `mm_struct.mmap` and `vm_area_struct.vm_next`.
    List { mmap: u64, next: u64 },
    /// In a maple tree: offset of `mm_struct.mm_mt.ma_root`.
    Tree { root: u64, tree: Tree },
}

impl<'a> Maps<'a> {
    /// Looks up where a kernel keeps maps.
    ///
    /// # Errors
    /// [`KernelError`]: its types lack something.
    pub fn new(kernel: &'a Kernel<'a>) -> Result<Self, KernelError> {
        let mm = |member| kernel.offset("mm_struct", member);
        let place = match mm("mm_mt.ma_root") {
            Ok(root) => Place::Tree { root, tree: Tree::new(kernel)? },
            Err(_) => {
                Place::List { mmap: mm("mmap")?, next: kernel.offset("vm_area_struct", "vm_next")? }
            }
        };
        Ok(Self {
            kernel,
            areas: Areas::new(kernel)?,
            mm: kernel.offset("task_struct", "mm")?,
            place,
            map_count: mm("map_count")?,
            mm_count: mm("mm_count").ok(),
            budget: Budget::new(LISTING, LIMIT),
        })
    }

    /// The same with another limit, in bytes, of what the mappings of all processes take.
    #[must_use]
    pub fn with_limit(self, bytes: usize) -> Self {
        Self { budget: Budget::new(bytes, LIMIT), ..self }
    }

    /// The map of a process; empty for one that has ended, and for the kernel's own.
    ///
    /// # Errors
    /// [`KernelError`]; [`KernelError::TooMuch`] where the mappings of all processes so far take
    /// more than 1 GiB.
    pub fn of(&self, task: &Task) -> Result<MemoryMap, KernelError> {
        let left = self.budget.left();
        let mut result = self.read(task);
        for _ in 1..TRIES {
            match &result {
                Ok(map) if !map.is_torn && !map.is_damaged() => break,
                Err(error) if error.is_final() => break,
                _ => {
                    self.budget.restore(left);
                    result = self.read(task);
                }
            }
        }
        result
    }

    fn read(&self, task: &Task) -> Result<MemoryMap, KernelError> {
        let mm = self.kernel.read_u64(task.gva.wrapping_add(self.mm))?;
        if mm == 0 || task.is_kernel {
            return Ok(MemoryMap::default());
        }
        if let Some(count) = self.mm_count
            && self.kernel.read_u32(mm.wrapping_add(count))? == 0
        {
            return Err(KernelError::Malformed {
                what: "the memory of a process".to_owned(),
                gva: mm,
            });
        }
        let count = self.kernel.read_u32(mm.wrapping_add(self.map_count))?;
        let names = self.areas.names(mm)?;
        let mut mappings: Vec<Mapping> = Vec::new();
        let (places, mut lost) = self.places(mm)?;
        for (gva, place) in places {
            self.budget.take(size_of::<Mapping>())?;
            let lowest = mappings.last().map_or(0, |last| last.end);
            let mapping = match self.areas.read(gva, mm, &names) {
                Ok(mapping)
                    if mapping.start >= lowest && place == (mapping.start, mapping.end - 1) =>
                {
                    mapping
                }
                Err(error) if !error.is_local() => return Err(error),
                // The pointer that leads there gives the place.
                found => {
                    let (start, end) = (place.0, place.1.saturating_add(1));
                    if start < lowest || !is_page(start) || !is_page(end) {
                        let malformed =
                            || KernelError::Malformed { what: "the memory area".to_owned(), gva };
                        lost = lost.or_else(|| Some(found.err().unwrap_or_else(malformed)));
                        continue;
                    }
                    Mapping { start, end, is_damaged: true, ..Mapping::default() }
                }
            };
            let path = mapping.file.as_ref().map_or(0, |file| file.path.text.len());
            self.budget.take(path + mapping.label.as_ref().map_or(0, String::len))?;
            mappings.push(mapping);
        }
        let is_torn = u32::try_from(mappings.len()).ok() != Some(count)
            || self.kernel.read_u32(mm.wrapping_add(self.map_count))? != count
            || self.kernel.read_u64(task.gva.wrapping_add(self.mm))? != mm;
        // What belongs to no process, and is there in each: the highest addresses.
        let gate = self.areas.gate();
        mappings.extend(gate.as_ref().ok().cloned().flatten());
        match lost.or_else(|| gate.err()) {
            Some(error) if mappings.is_empty() || !error.is_local() => Err(error),
            lost => Ok(MemoryMap {
                mappings,
                is_torn: is_torn && lost.is_none(),
                is_cut: lost.is_some(),
            }),
        }
    }

    /// A process's areas, each with its first and last address as the list or tree has it, and why
    /// there are not more.
    fn places(&self, mm: u64) -> Result<(Vec<Entry>, Option<KernelError>), KernelError> {
        match &self.place {
            Place::Tree { root, tree } => {
                let root = self.kernel.read_u64(mm.wrapping_add(*root))?;
                tree.entries(self.kernel, root, &self.budget)
            }
            Place::List { mmap, next } => {
                let mut places = Vec::new();
                let first = self.kernel.read_u64(mm.wrapping_add(*mmap))?;
                let lost = self.list(first, *next, &mut places).err();
                Ok((places, lost))
            }
        }
    }

    /// The list's areas. What does not ascend ends it here already: the list of a guest that lies
    /// has no end.
    fn list(&self, first: u64, next: u64, places: &mut Vec<Entry>) -> Result<(), KernelError> {
        let (mut gva, mut lowest) = (first, 0);
        while gva != 0 {
            let (start, end) = self.areas.range(gva)?;
            if start < lowest || places.len() >= MAX_AREAS {
                return Err(KernelError::Malformed {
                    what: "the list of memory areas".to_owned(),
                    gva,
                });
            }
            places.push((gva, (start, end - 1)));
            (lowest, gva) = (end, self.kernel.read_u64(gva.wrapping_add(next))?);
        }
        Ok(())
    }
}

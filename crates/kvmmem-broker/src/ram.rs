// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The RAM of a registered VM. It is read and written through its files and never mapped here, so
//! nothing that the VM or its VMM does to it can disturb the broker.
//!
//! Where a VMM keeps the RAM to itself there is no file that others could map. It is copied then,
//! by way of `/proc/PID/mem`, and goes to tools as copies alone.

mod backing;
mod error;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use kvmmem_proto::map::{MemoryMap, Region};
use kvmmem_qemu::file_id::FileId;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::core::layout::Layout;
use backing::Backing;
pub(crate) use error::{AccessError, RamError};

/// Where a VM's RAM lies and its memory map, checked.
#[derive(Debug)]
pub(crate) struct Ram {
    backing: Backing,
    layout: RwLock<Arc<Layout>>,
}

impl Ram {
    /// Checks memfds, and the regions that lie in them: each file must be named by [`Region::file`]
    /// or be before one that is.
    pub(crate) fn new(files: Vec<OwnedFd>, regions: Vec<Region>) -> Result<Self, RamError> {
        let map = MemoryMap::new(regions)?;
        Ok(Self::with(Backing::files(files, &map)?, map))
    }

    /// The RAM of a VM that is private to its VMM: `memory` is `/proc/PID/mem` of the VMM,
    /// open for reading and writing, and [`Region::offset`] is the region's address in that
    /// process ([`Region::file`] is 0).
    ///
    /// Peers cannot register such RAM: only the broker opens it.
    pub(crate) fn of_process(memory: OwnedFd, regions: Vec<Region>) -> Result<Self, RamError> {
        let map = MemoryMap::new(regions)?;
        Ok(Self::with(Backing::process(memory, &map)?, map))
    }

    fn with(backing: Backing, map: MemoryMap) -> Self {
        let is_private = matches!(backing, Backing::Process(_));
        let layout = Layout { generation: first_generation(), map, is_private };
        Self { backing, layout: RwLock::new(Arc::new(layout)) }
    }

    /// Replaces the memory map by one in the same files. Who has the old layout keeps it.
    ///
    /// # Errors
    /// What is wrong with the regions; nothing has changed then.
    pub(crate) fn change(&self, regions: Vec<Region>) -> Result<(), RamError> {
        let map = MemoryMap::new(regions)?;
        self.backing.check(&map)?;
        let mut layout = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        let (generation, is_private) = (layout.generation.saturating_add(1), layout.is_private);
        *layout = Arc::new(Layout { generation, map, is_private });
        Ok(())
    }

    /// Takes the generation that the same RAM of the same VM had in a registration before. It
    /// counts for what this registration tells from now on.
    pub(crate) fn continue_from(&self, generation: u64) {
        let mut layout = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        let (map, is_private) = (layout.map.clone(), layout.is_private);
        *layout = Arc::new(Layout { generation, map, is_private });
    }

    /// Where the RAM is now.
    pub(crate) fn layout(&self) -> Arc<Layout> {
        Arc::clone(&self.layout.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the RAM is private to the VMM's process, so that it can be copied and not mapped.
    pub(crate) fn is_private(&self) -> bool {
        matches!(self.backing, Backing::Process(_))
    }

    /// The memfds, by their numbers; none where the RAM is private.
    pub(crate) fn files(&self) -> Vec<BorrowedFd<'_>> {
        self.memfds().iter().map(AsFd::as_fd).collect()
    }

    fn memfds(&self) -> &[OwnedFd] {
        match &self.backing {
            Backing::Files(files) => files,
            Backing::Process(_) => &[],
        }
    }

    /// The memfds opened anew, for reading alone.
    ///
    /// # Errors
    /// Where one cannot be opened.
    pub(crate) fn open_read_only(&self) -> Result<Vec<OwnedFd>, Errno> {
        // `/proc/self/fd` names the memfd itself; the flags of the descriptor do not matter.
        let path = |file: &OwnedFd| format!("/proc/self/fd/{}", file.as_raw_fd());
        let open =
            |file| rustix::fs::open(path(file), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        self.memfds().iter().map(open).collect()
    }

    /// The memfds once more.
    pub(crate) fn duplicate(&self) -> Result<Vec<OwnedFd>, Errno> {
        self.memfds().iter().map(|file| rustix::io::fcntl_dupfd_cloexec(file, 0)).collect()
    }

    /// Whether a file, or the process that is the RAM, is a part of this RAM and of the other.
    ///
    /// # Errors
    /// Where a file cannot be examined.
    pub(crate) fn overlaps(&self, other: &Self) -> Result<bool, Errno> {
        let identities = |ram: &Self| match &ram.backing {
            Backing::Files(files) => files.iter().map(identity).collect::<Result<Vec<_>, Errno>>(),
            Backing::Process(memory) => Ok(vec![identity(memory)?]),
        };
        let own = identities(self)?;
        Ok(identities(other)?.iter().any(|file| own.contains(file)))
    }

    /// Fills all of `buffer` with guest-physical memory.
    ///
    /// # Errors
    /// [`AccessError`] names the first address that was not read.
    pub(crate) fn read(&self, mut gpa: u64, mut buffer: &mut [u8]) -> Result<(), AccessError> {
        while !buffer.is_empty() {
            let count = self.read_some(gpa, buffer)?;
            buffer = buffer.get_mut(count..).unwrap_or_default();
            gpa += count as u64;
        }
        Ok(())
    }

    /// Writes all of `data` to guest-physical memory.
    ///
    /// # Errors
    /// [`AccessError`] names the first address that was not written; what is before it was.
    pub(crate) fn write(&self, mut gpa: u64, mut data: &[u8]) -> Result<(), AccessError> {
        while !data.is_empty() {
            let count = self.write_some(gpa, data)?;
            data = data.get(count..).unwrap_or_default();
            gpa += count as u64;
        }
        Ok(())
    }

    /// Copies as much guest-physical memory as is in one piece, at most `buffer`, and returns how
    /// many bytes: none only where the buffer is empty.
    pub(crate) fn read_some(&self, gpa: u64, buffer: &mut [u8]) -> Result<usize, AccessError> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let (file, offset, len) = self.place(gpa, buffer.len())?;
        let part = buffer.get_mut(..len).unwrap_or_default();
        self.backing.read(file, offset, part).map_err(|source| AccessError::System { gpa, source })
    }

    /// Copies as much of `data` as fits in one piece of guest-physical memory, and returns how many
    /// bytes: none only where there is no data.
    pub(crate) fn write_some(&self, gpa: u64, data: &[u8]) -> Result<usize, AccessError> {
        if data.is_empty() {
            return Ok(0);
        }
        let (file, offset, len) = self.place(gpa, data.len())?;
        let part = data.get(..len).unwrap_or_default();
        self.backing.write(file, offset, part).map_err(|source| AccessError::System { gpa, source })
    }

    /// Copies at most `len` bytes that are in one piece, by means of the caller's: `copy` gets the
    /// file, the offset in it and how many bytes. For a buffer that a peer has mapped too.
    pub(crate) fn copy_some(
        &self,
        gpa: u64,
        len: usize,
        copy: impl Fn(BorrowedFd<'_>, u64, usize) -> Result<usize, Errno>,
    ) -> Result<usize, AccessError> {
        let (file, offset, len) = self.place(gpa, len)?;
        let copied = self.backing.copy(file, |file| copy(file, offset, len));
        copied.map_err(|source| AccessError::System { gpa, source })
    }

    /// The number of the file and the offset in it of a guest-physical address, and how many bytes,
    /// at most `len`, are there in one piece.
    fn place(&self, gpa: u64, len: usize) -> Result<(u32, u64, usize), AccessError> {
        let layout = self.layout.read().unwrap_or_else(PoisonError::into_inner);
        let region = layout.map.region_of(gpa).ok_or(AccessError::Hole(gpa))?;
        let within = gpa - region.gpa;
        let left = usize::try_from(region.len - within).unwrap_or(usize::MAX);
        Ok((region.file, region.offset + within, len.min(left)))
    }
}

fn identity(file: &OwnedFd) -> Result<FileId, Errno> {
    rustix::fs::fstat(file).map(|stat| FileId::of(&stat))
}

/// Microseconds since the epoch: a VM does not change so often that the next registration comes to
/// a number it had.
fn first_generation() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(1)
}

#[cfg(test)]
mod tests;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The RAM of a registered VM. It is read and written through its memfd and never mapped here, so nothing that the VM
//! or its VMM does to it can disturb the broker.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, SealFlags};
use rustix::io::Errno;

use crate::map::{MapError, MemoryMap, Region};

/// A VM's memfd and memory map, checked.
#[derive(Debug)]
pub struct Ram {
    fd: OwnedFd,
    map: MemoryMap,
}

/// Why a file descriptor cannot be a VM's RAM.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The memory map breaks a rule.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The file descriptor is not a memfd.
    #[error("RAM's file descriptor is not a memfd that can be sealed")]
    NotMemfd(#[source] Errno),
    /// The memfd may shrink under those who map it.
    #[error("RAM's memfd lacks F_SEAL_SHRINK")]
    Unsealed,
    /// The memfd is sealed against writing, or was opened read-only.
    #[error("RAM's memfd cannot be written")]
    ReadOnly,
    /// The memfd ends before the last region does.
    #[error("RAM's memfd has {size:#x} bytes, its regions need {needed:#x}")]
    Small {
        /// Its size.
        size: u64,
        /// Where the last region ends.
        needed: u64,
    },
    /// The memfd's size or mode cannot be read.
    #[error("cannot examine RAM's memfd")]
    Examine(#[source] Errno),
}

/// Why guest-physical memory was not read or written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// No RAM is there.
    #[error("gpa {0:#x} is not backed by RAM")]
    Hole(u64),
    /// The memfd refused.
    #[error("cannot access the RAM at gpa {gpa:#x}")]
    Memfd {
        /// The address.
        gpa: u64,
        /// Why.
        #[source]
        source: Errno,
    },
}

impl Ram {
    /// Checks a memfd and the regions that lie in it.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn new(fd: OwnedFd, regions: Vec<Region>) -> Result<Self, RamError> {
        let map = MemoryMap::new(regions)?;
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(RamError::NotMemfd)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(RamError::Unsealed);
        }
        let mode = rustix::fs::fcntl_getfl(&fd).map_err(RamError::Examine)?;
        let read_write = mode & OFlags::RWMODE == OFlags::RDWR;
        if !read_write || seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
            return Err(RamError::ReadOnly);
        }
        let size = rustix::fs::fstat(&fd).map_err(RamError::Examine)?.st_size;
        let (size, needed) = (u64::try_from(size).unwrap_or(0), map.file_size());
        if size < needed {
            return Err(RamError::Small { size, needed });
        }
        Ok(Self { fd, map })
    }

    /// The memory map.
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Copies guest-physical memory out; the range lies within one page.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn read(&self, gpa: u64, mut buffer: &mut [u8]) -> Result<(), AccessError> {
        let mut offset = self.map.resolve(gpa).ok_or(AccessError::Hole(gpa))?;
        while !buffer.is_empty() {
            match rustix::io::pread(&self.fd, &mut *buffer, offset) {
                Ok(0) => return Err(AccessError::Memfd { gpa, source: Errno::NXIO }),
                Ok(count) => {
                    buffer = buffer.get_mut(count..).unwrap_or_default();
                    offset += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(source) => return Err(AccessError::Memfd { gpa, source }),
            }
        }
        Ok(())
    }

    /// Copies into guest-physical memory; the range lies within one page.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn write(&self, gpa: u64, mut data: &[u8]) -> Result<(), AccessError> {
        let mut offset = self.map.resolve(gpa).ok_or(AccessError::Hole(gpa))?;
        while !data.is_empty() {
            match rustix::io::pwrite(&self.fd, data, offset) {
                Ok(0) => return Err(AccessError::Memfd { gpa, source: Errno::NOSPC }),
                Ok(count) => {
                    data = data.get(count..).unwrap_or_default();
                    offset += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(source) => return Err(AccessError::Memfd { gpa, source }),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    fn memfd(size: u64, seals: SealFlags) -> OwnedFd {
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, size).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    fn regions() -> Vec<Region> {
        vec![
            Region { gpa: 0, len: 0x2000, offset: 0 },
            Region { gpa: 0x10_0000, len: 0x1000, offset: 0x10_0000 },
        ]
    }

    #[test]
    fn memory_is_read_and_written_but_for_holes() {
        let ram = Ram::new(memfd(0x10_1000, SealFlags::SHRINK), regions()).unwrap();
        ram.write(0x10_0ffd, b"abc").unwrap();
        let mut bytes = [1; 4];
        ram.read(0x10_0ffc, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0abc");
        assert_eq!(ram.read(0x2000, &mut bytes), Err(AccessError::Hole(0x2000)));
        assert_eq!(ram.write(0x10_1000, &bytes), Err(AccessError::Hole(0x10_1000)));
    }

    #[test]
    fn what_is_no_ram_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Ram::new(null.into(), regions()), Err(RamError::NotMemfd(_))));
        assert!(matches!(Ram::new(memfd(0x10_1000, SealFlags::GROW), regions()), Err(RamError::Unsealed)));
        assert!(matches!(
            Ram::new(memfd(0x10_1000, SealFlags::SHRINK | SealFlags::WRITE), regions()),
            Err(RamError::ReadOnly)
        ));
        assert!(matches!(
            Ram::new(memfd(0x10_0fff, SealFlags::SHRINK), regions()),
            Err(RamError::Small { size: 0x10_0fff, needed: 0x10_1000 })
        ));
        assert!(matches!(Ram::new(memfd(0, SealFlags::SHRINK), vec![]), Err(RamError::Map(MapError::Empty))));
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x10_1000).unwrap();
        assert!(matches!(Ram::new(file.into(), regions()), Err(RamError::NotMemfd(_) | RamError::Unsealed)));
    }
}

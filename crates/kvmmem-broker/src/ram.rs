// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The RAM of a registered VM. It is read and written through its memfd and never mapped here, so nothing that the VM
//! or its VMM does to it can disturb the broker.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, SealFlags};
use rustix::io::Errno;

use crate::map::{MapError, MemoryMap, Region};

/// A VM's memfd and memory map, checked.
#[derive(Debug)]
pub struct Ram {
    fd: OwnedFd,
    layout: RwLock<Arc<Layout>>,
}

/// Where the RAM is, for some time.
#[derive(Debug)]
pub struct Layout {
    /// Grows with each change, also where the map stays as it is, and from one registration of a VM to its next: so that
    /// whoever keeps a number can tell whether it is still the same memory.
    pub generation: u64,
    /// The memory map.
    pub map: MemoryMap,
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
        check_size(&fd, &map)?;
        Ok(Self { fd, layout: RwLock::new(Arc::new(Layout { generation: first_generation(), map })) })
    }

    /// Replaces the memory map by one in the same memfd. Who has the old layout keeps it.
    ///
    /// # Errors
    /// What is wrong with the regions; nothing has changed then.
    pub fn change(&self, regions: Vec<Region>) -> Result<(), RamError> {
        let map = MemoryMap::new(regions)?;
        check_size(&self.fd, &map)?;
        let mut layout = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        *layout = Arc::new(Layout { generation: layout.generation + 1, map });
        Ok(())
    }

    /// Where the RAM is now.
    pub fn layout(&self) -> Arc<Layout> {
        Arc::clone(&self.layout.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The memfd opened anew, for reading alone.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub fn open_read_only(&self) -> Result<OwnedFd, Errno> {
        // What `/proc/self/fd` names is the memfd itself, whatever it was opened for.
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
    }

    fn resolve(&self, gpa: u64) -> Option<u64> {
        self.layout.read().unwrap_or_else(PoisonError::into_inner).map.resolve(gpa)
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
        let mut offset = self.resolve(gpa).ok_or(AccessError::Hole(gpa))?;
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
        let mut offset = self.resolve(gpa).ok_or(AccessError::Hole(gpa))?;
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

fn check_size(fd: &OwnedFd, map: &MemoryMap) -> Result<(), RamError> {
    let size = rustix::fs::fstat(fd).map_err(RamError::Examine)?.st_size;
    let (size, needed) = (u64::try_from(size).unwrap_or(0), map.file_size());
    if size < needed { Err(RamError::Small { size, needed }) } else { Ok(()) }
}

/// Microseconds since the epoch: a VM does not change so often that the next registration comes to a number it had.
fn first_generation() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(1)
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
    fn a_changed_map_counts_at_once() {
        let ram = Ram::new(memfd(0x10_1000, SealFlags::SHRINK), regions()).unwrap();
        ram.write(0x10_0000, b"x").unwrap();
        let first = ram.layout().generation;
        ram.change(vec![Region { gpa: 0x8000, len: 0x1000, offset: 0x10_0000 }]).unwrap();
        let mut byte = [0];
        ram.read(0x8000, &mut byte).unwrap();
        assert_eq!((&byte, ram.layout().generation), (b"x", first + 1));
        assert_eq!(ram.read(0x10_0000, &mut byte), Err(AccessError::Hole(0x10_0000)));
        let beyond = vec![Region { gpa: 0, len: 0x1000, offset: 0x10_1000 }];
        assert!(matches!(ram.change(beyond), Err(RamError::Small { .. })));
        assert!(matches!(ram.change(vec![]), Err(RamError::Map(MapError::Empty))));
        assert_eq!(ram.layout().generation, first + 1);
    }

    #[test]
    fn a_new_registration_has_a_higher_generation() {
        let old = Ram::new(memfd(0x10_1000, SealFlags::SHRINK), regions()).unwrap();
        old.change(regions()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
        let new = Ram::new(memfd(0x10_1000, SealFlags::SHRINK), regions()).unwrap();
        assert!(new.layout().generation > old.layout().generation);
    }

    #[test]
    fn a_read_only_descriptor_cannot_write() {
        let ram = Ram::new(memfd(0x10_1000, SealFlags::SHRINK), regions()).unwrap();
        ram.write(0, b"stripes").unwrap();
        let fd = ram.open_read_only().unwrap();
        let mut bytes = [0; 7];
        rustix::io::pread(&fd, &mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"stripes");
        assert_eq!(rustix::io::pwrite(&fd, b"x", 0), Err(Errno::BADF));
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

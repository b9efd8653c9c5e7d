// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The RAM of a registered VM. It is read and written through its files and never mapped here, so nothing that the VM
//! or its VMM does to it can disturb the broker.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, SealFlags};
use rustix::io::Errno;

use crate::map::{MapError, MemoryMap, Region};

/// A VM's memfds and memory map, checked.
#[derive(Debug)]
pub struct Ram {
    files: Vec<OwnedFd>,
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

/// Why file descriptors cannot be a VM's RAM.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The memory map breaks a rule.
    #[error(transparent)]
    Map(#[from] MapError),
    /// There are fewer or more file descriptors than the regions name.
    #[error("RAM came as {found} files, its regions name {needed}")]
    Count {
        /// How many came.
        found: usize,
        /// How many there must be.
        needed: usize,
    },
    /// A file descriptor is not a memfd.
    #[error("RAM's file descriptor is not a memfd that can be sealed")]
    NotMemfd(#[source] Errno),
    /// A memfd may shrink under those who map it.
    #[error("RAM's memfd lacks F_SEAL_SHRINK")]
    Unsealed,
    /// A memfd is sealed against writing, or was opened read-only.
    #[error("RAM's memfd cannot be written")]
    ReadOnly,
    /// A memfd ends before the last of its regions does.
    #[error("RAM's memfd has {size:#x} bytes, its regions need {needed:#x}")]
    Small {
        /// Its size.
        size: u64,
        /// Where the last region ends.
        needed: u64,
    },
    /// A memfd's size or mode cannot be read.
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
    /// Checks memfds, and the regions that lie in them: each file must be named by [`Region::file`] or be before one
    /// that is.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn new(files: Vec<OwnedFd>, regions: Vec<Region>) -> Result<Self, RamError> {
        let map = MemoryMap::new(regions)?;
        let (found, needed) = (files.len(), map.file_count());
        if found != needed {
            return Err(RamError::Count { found, needed });
        }
        files.iter().try_for_each(check_file)?;
        check_sizes(&files, &map)?;
        Ok(Self { files, layout: RwLock::new(Arc::new(Layout { generation: first_generation(), map })) })
    }

    /// Replaces the memory map by one in the same files. Who has the old layout keeps it.
    ///
    /// # Errors
    /// What is wrong with the regions; nothing has changed then.
    pub fn change(&self, regions: Vec<Region>) -> Result<(), RamError> {
        let map = MemoryMap::new(regions)?;
        check_sizes(&self.files, &map)?;
        let mut layout = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        *layout = Arc::new(Layout { generation: layout.generation + 1, map });
        Ok(())
    }

    /// Where the RAM is now.
    pub fn layout(&self) -> Arc<Layout> {
        Arc::clone(&self.layout.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The memfds, by their numbers.
    pub fn files(&self) -> Vec<BorrowedFd<'_>> {
        self.files.iter().map(AsFd::as_fd).collect()
    }

    /// The memfds opened anew, for reading alone.
    ///
    /// # Errors
    /// Where one cannot be opened.
    pub fn open_read_only(&self) -> Result<Vec<OwnedFd>, Errno> {
        // What `/proc/self/fd` names is the memfd itself, whatever it was opened for.
        let path = |file: &OwnedFd| format!("/proc/self/fd/{}", file.as_raw_fd());
        let open = |file| rustix::fs::open(path(file), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        self.files.iter().map(open).collect()
    }

    /// The memfds once more.
    ///
    /// # Errors
    /// Where there is no file descriptor left.
    pub fn duplicate(&self) -> Result<Vec<OwnedFd>, Errno> {
        self.files.iter().map(|file| rustix::io::fcntl_dupfd_cloexec(file, 0)).collect()
    }

    /// Whether a file is a part of this RAM and of the other.
    ///
    /// # Errors
    /// Where a file cannot be examined.
    pub fn overlaps(&self, other: &Self) -> Result<bool, Errno> {
        let identities = |ram: &Self| ram.files.iter().map(identity).collect::<Result<Vec<_>, Errno>>();
        let own = identities(self)?;
        Ok(identities(other)?.iter().any(|file| own.contains(file)))
    }

    /// The file and the offset in it of a guest-physical address.
    fn place(&self, gpa: u64) -> Result<(&OwnedFd, u64), AccessError> {
        let layout = self.layout.read().unwrap_or_else(PoisonError::into_inner);
        let place = layout.map.resolve(gpa);
        let file = place.and_then(|(file, _)| self.files.get(usize::try_from(file).ok()?));
        file.zip(place.map(|(_, offset)| offset)).ok_or(AccessError::Hole(gpa))
    }

    /// Copies guest-physical memory out; the range lies within one page.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn read(&self, gpa: u64, mut buffer: &mut [u8]) -> Result<(), AccessError> {
        let (file, mut offset) = self.place(gpa)?;
        while !buffer.is_empty() {
            match rustix::io::pread(file, &mut *buffer, offset) {
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
        let (file, mut offset) = self.place(gpa)?;
        while !data.is_empty() {
            match rustix::io::pwrite(file, data, offset) {
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

fn check_file(file: &OwnedFd) -> Result<(), RamError> {
    let seals = rustix::fs::fcntl_get_seals(file).map_err(RamError::NotMemfd)?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err(RamError::Unsealed);
    }
    let mode = rustix::fs::fcntl_getfl(file).map_err(RamError::Examine)?;
    let read_write = mode & OFlags::RWMODE == OFlags::RDWR;
    if !read_write || seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(RamError::ReadOnly);
    }
    Ok(())
}

/// A changed map may leave files out.
fn check_sizes(files: &[OwnedFd], map: &MemoryMap) -> Result<(), RamError> {
    let (found, needed) = (files.len(), map.file_count());
    if found < needed {
        return Err(RamError::Count { found, needed });
    }
    for (number, file) in (0..).zip(files) {
        let size = rustix::fs::fstat(file).map_err(RamError::Examine)?.st_size;
        let (size, needed) = (u64::try_from(size).unwrap_or(0), map.file_size(number));
        if size < needed {
            return Err(RamError::Small { size, needed });
        }
    }
    Ok(())
}

/// Device and inode of a file.
fn identity(file: &OwnedFd) -> Result<(u64, u64), Errno> {
    rustix::fs::fstat(file).map(|stat| (stat.st_dev, stat.st_ino))
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
            Region { gpa: 0, len: 0x2000, offset: 0, file: 0 },
            Region { gpa: 0x10_0000, len: 0x1000, offset: 0x10_0000, file: 0 },
        ]
    }

    #[test]
    fn memory_is_read_and_written_but_for_holes() {
        let ram = Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK)], regions()).unwrap();
        ram.write(0x10_0ffd, b"abc").unwrap();
        let mut bytes = [1; 4];
        ram.read(0x10_0ffc, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0abc");
        assert_eq!(ram.read(0x2000, &mut bytes), Err(AccessError::Hole(0x2000)));
        assert_eq!(ram.write(0x10_1000, &bytes), Err(AccessError::Hole(0x10_1000)));
    }

    #[test]
    fn a_changed_map_counts_at_once() {
        let ram = Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK)], regions()).unwrap();
        ram.write(0x10_0000, b"x").unwrap();
        let first = ram.layout().generation;
        ram.change(vec![Region { gpa: 0x8000, len: 0x1000, offset: 0x10_0000, file: 0 }]).unwrap();
        let mut byte = [0];
        ram.read(0x8000, &mut byte).unwrap();
        assert_eq!((&byte, ram.layout().generation), (b"x", first + 1));
        assert_eq!(ram.read(0x10_0000, &mut byte), Err(AccessError::Hole(0x10_0000)));
        let beyond = vec![Region { gpa: 0, len: 0x1000, offset: 0x10_1000, file: 0 }];
        assert!(matches!(ram.change(beyond), Err(RamError::Small { .. })));
        assert!(matches!(ram.change(vec![]), Err(RamError::Map(MapError::Empty))));
        assert_eq!(ram.layout().generation, first + 1);
    }

    #[test]
    fn a_new_registration_has_a_higher_generation() {
        let old = Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK)], regions()).unwrap();
        old.change(regions()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
        let new = Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK)], regions()).unwrap();
        assert!(new.layout().generation > old.layout().generation);
    }

    #[test]
    fn a_read_only_descriptor_cannot_write() {
        let ram = Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK)], regions()).unwrap();
        ram.write(0, b"stripes").unwrap();
        let files = ram.open_read_only().unwrap();
        let [fd] = files.as_slice() else { panic!("{files:?}") };
        let mut bytes = [0; 7];
        rustix::io::pread(fd, &mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"stripes");
        assert_eq!(rustix::io::pwrite(fd, b"x", 0), Err(Errno::BADF));
    }

    #[test]
    fn each_region_is_read_in_its_file() {
        let node = |gpa, file| Region { gpa, len: 0x2000, offset: 0, file };
        let files = || vec![memfd(0x2000, SealFlags::SHRINK), memfd(0x2000, SealFlags::SHRINK)];
        let ram = Ram::new(files(), vec![node(0, 0), node(0x2000, 1)]).unwrap();
        ram.write(0x1000, b"first").unwrap();
        ram.write(0x3000, b"second").unwrap();
        let mut bytes = [0; 6];
        rustix::io::pread(ram.files()[1], &mut bytes, 0x1000).unwrap();
        assert_eq!(&bytes, b"second");
        ram.change(vec![node(0, 1), node(0x2000, 0)]).unwrap();
        ram.read(0x1000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"second");
        // One of them may go, but none come.
        ram.change(vec![node(0, 0)]).unwrap();
        let third = ram.change(vec![node(0, 2)]);
        assert!(matches!(third, Err(RamError::Count { found: 2, needed: 3 })), "{third:?}");
        for regions in [vec![node(0, 0)], vec![node(0, 2)]] {
            assert!(matches!(Ram::new(files(), regions), Err(RamError::Count { found: 2, .. })));
        }
        let small = Ram::new(files(), vec![node(0, 0), Region { len: 0x3000, ..node(0x2000, 1) }]);
        assert!(matches!(small, Err(RamError::Small { size: 0x2000, needed: 0x3000 })));
    }

    #[test]
    fn one_file_in_common_is_enough_to_overlap() {
        let node = |gpa, file| Region { gpa, len: 0x2000, offset: 0, file };
        let two = || {
            Ram::new(
                vec![memfd(0x2000, SealFlags::SHRINK), memfd(0x2000, SealFlags::SHRINK)],
                vec![node(0, 0), node(0x2000, 1)],
            )
            .unwrap()
        };
        let (ram, other) = (two(), two());
        assert!(ram.overlaps(&ram).unwrap() && !ram.overlaps(&other).unwrap());
        let second = ram.duplicate().unwrap().pop().unwrap();
        let part = Ram::new(vec![second], vec![node(0, 0)]).unwrap();
        assert!(part.overlaps(&ram).unwrap() && ram.overlaps(&part).unwrap());
        assert!(!part.overlaps(&other).unwrap());
    }

    #[test]
    fn what_is_no_ram_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Ram::new(vec![null.into()], regions()), Err(RamError::NotMemfd(_))));
        assert!(matches!(
            Ram::new(vec![memfd(0x10_1000, SealFlags::GROW)], regions()),
            Err(RamError::Unsealed)
        ));
        assert!(matches!(
            Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK | SealFlags::WRITE)], regions()),
            Err(RamError::ReadOnly)
        ));
        assert!(matches!(
            Ram::new(vec![memfd(0x10_0fff, SealFlags::SHRINK)], regions()),
            Err(RamError::Small { size: 0x10_0fff, needed: 0x10_1000 })
        ));
        assert!(matches!(
            Ram::new(vec![memfd(0, SealFlags::SHRINK)], vec![]),
            Err(RamError::Map(MapError::Empty))
        ));
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x10_1000).unwrap();
        assert!(matches!(
            Ram::new(vec![file.into()], regions()),
            Err(RamError::NotMemfd(_) | RamError::Unsealed)
        ));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files of huge pages (hugetlbfs, memfds of MFD_HUGETLB).
//!
//! The kernel maps them in whole huge pages, silently rounds a length up, and has no write(2) for
//! them. The broker writes RAM of QEMU's with this.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::FsWord;
use rustix::io::Errno;

use crate::foreign::{Foreign, ForeignError};
use crate::page::PAGE_SIZE;

/// The kernel's number for hugetlbfs (`HUGETLBFS_MAGIC`).
const HUGETLBFS: FsWord = 0x9584_58f6;

/// Length in bytes of the pages in which a file is mapped: a power of two, 4096 for all but files
/// of huge pages. It never changes.
///
/// # Errors
/// The system's.
pub fn page_size(file: BorrowedFd<'_>) -> Result<u64, Errno> {
    let filesystem = rustix::fs::fstatfs(file)?;
    if filesystem.f_type != HUGETLBFS {
        return Ok(PAGE_SIZE as u64);
    }
    let size = u64::try_from(filesystem.f_bsize).unwrap_or(0);
    if size.is_power_of_two() && size >= PAGE_SIZE as u64 { Ok(size) } else { Err(Errno::INVAL) }
}

/// Writes to a file at an offset, also to one of huge pages; returns how many bytes, at least one
/// unless there are none.
///
/// # Errors
/// The system's; `ENOMEM` where there is no huge page left.
pub fn write_at(file: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> Result<usize, Errno> {
    match rustix::io::pwrite(file, bytes, offset) {
        // What the kernel says of files that it cannot write, and of much else.
        Err(Errno::INVAL) => {}
        written => return written,
    }
    let page = page_size(file)?;
    if page == PAGE_SIZE as u64 {
        return Err(Errno::INVAL);
    }
    let within = offset % page;
    let len = usize::try_from(page - within).unwrap_or(usize::MAX).min(bytes.len());
    let memory = Foreign::reserve(page, 0, true, page)?;
    memory.place(0, page, file.as_fd(), offset - within)?;
    match memory.write(within, bytes.get(..len).unwrap_or_default()) {
        Ok(()) => Ok(len),
        Err(ForeignError::Lost { .. }) => Err(Errno::NOMEM),
        Err(ForeignError::Guard(errno)) => Err(errno),
        Err(_) => Err(Errno::INVAL),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;

    use rustix::fs::MemfdFlags;

    use super::*;

    pub(crate) const HUGE: u64 = 2 << 20;

    /// A file of so many huge pages, whose words at multiples of 4096 hold their offset; `None`,
    /// with a word about it, on a host that has none.
    pub(crate) fn huge_file(pages: u64) -> Option<File> {
        let flags = MemfdFlags::CLOEXEC
            | MemfdFlags::ALLOW_SEALING
            | MemfdFlags::HUGETLB
            | MemfdFlags::HUGE_2MB;
        let made = rustix::fs::memfd_create("huge", flags).and_then(|file: OwnedFd| {
            rustix::fs::ftruncate(&file, pages * HUGE)?;
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, pages * HUGE)?;
            Ok(File::from(file))
        });
        let file = made
            .inspect_err(|error| {
                eprintln!(
                    "skipped: no {pages} huge pages ({error}): sysctl vm.nr_hugepages=16 sets some aside"
                )
            })
            .ok()?;
        for offset in (0..pages * HUGE).step_by(0x1000) {
            assert_eq!(write_at(file.as_fd(), offset, &offset.to_le_bytes()), Ok(8));
        }
        Some(file)
    }

    #[test]
    fn other_files_have_small_pages() {
        let memfd = rustix::fs::memfd_create("small", MemfdFlags::CLOEXEC).unwrap();
        for file in [
            memfd.as_fd(),
            File::open("/dev/null").unwrap().as_fd(),
            File::open("/proc").unwrap().as_fd(),
        ] {
            assert_eq!(page_size(file), Ok(4096));
        }
        assert_eq!(write_at(memfd.as_fd(), 5, b"small"), Ok(5));
        assert_eq!(write_at(File::open("/dev/null").unwrap().as_fd(), 0, b"x"), Err(Errno::BADF));
    }

    #[test]
    fn files_of_huge_pages_are_written_page_by_page() {
        let Some(file) = huge_file(2) else { return };
        assert_eq!(page_size(file.as_fd()), Ok(HUGE));
        assert!(rustix::io::pwrite(&file, b"x", 0).is_err());
        assert_eq!(write_at(file.as_fd(), HUGE - 3, b"stripes"), Ok(3));
        assert_eq!(write_at(file.as_fd(), HUGE, b"ipes"), Ok(4));
        let mut bytes = [0; 9];
        file.read_exact_at(&mut bytes, HUGE - 4).unwrap();
        assert_eq!(&bytes, b"\0stripes\0");
        assert!(write_at(file.as_fd(), !0xfff, b"x").is_err());
    }
}

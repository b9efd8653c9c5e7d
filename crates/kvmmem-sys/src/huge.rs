// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files of huge pages (hugetlbfs, memfds of MFD_HUGETLB). The kernel maps them in whole huge
//! pages, and silently rounds a length up.

use std::os::fd::BorrowedFd;

use rustix::fs::FsWord;
use rustix::io::Errno;

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

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::File;
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::fs::MemfdFlags;

    use super::*;
    use crate::huge_write::write_at;

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
    }
}

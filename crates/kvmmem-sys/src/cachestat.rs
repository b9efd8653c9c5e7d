// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How much of a range of a file has contents (cachestat(2), since Linux 6.5), which the libc crate
//! does not wrap.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The call's number (arch/x86/entry/syscalls/syscall_64.tbl).
const CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range`.
#[repr(C)]
struct Range {
    off: u64,
    len: u64,
}

/// `struct cachestat`.
#[repr(C)]
#[derive(Default)]
struct Counts {
    cached: u64,
    _dirty: u64,
    _writeback: u64,
    evicted: u64,
    _recently_evicted: u64,
}

/// How many pages of `len` bytes at `offset` of a file in memory have contents, there or in swap
/// space. Unlike `SEEK_HOLE` this takes no lock of the file, which others need to change it.
///
/// # Errors
/// `ENOSYS` before Linux 6.5, `EOPNOTSUPP` for a file of huge pages, `EPERM` for one that this
/// process may not write.
pub fn pages_with_contents(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<u64> {
    let range = Range { off: offset, len };
    let mut counts = Counts::default();
    // SAFETY: the call reads `range` and writes `counts`, which have the kernel's layout and
    // outlive it.
    let result = unsafe {
        libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut counts, 0u32)
    };
    if result == 0 { Ok(counts.cached + counts.evicted) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn pages_that_were_written_are_counted() {
        let file =
            File::from(rustix::fs::memfd_create("pages", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(1 << 20).unwrap();
        for page in [0u64, 3, 4, 200] {
            file.write_all_at(&[1], page * 4096).unwrap();
        }
        match pages_with_contents(file.as_fd(), 0, 5 * 4096) {
            Ok(pages) => assert_eq!(pages, 3),
            Err(error) => return assert_eq!(error.raw_os_error(), Some(libc::ENOSYS)),
        }
        assert_eq!(pages_with_contents(file.as_fd(), 3 * 4096, 2 * 4096).unwrap(), 2);
        assert_eq!(pages_with_contents(file.as_fd(), 5 * 4096, 1 << 20).unwrap(), 1);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes to files, also of huge pages, for which the kernel has no write(2). The broker writes RAM
//! of QEMU's with this.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;

use crate::foreign::{Foreign, ForeignError};
use crate::huge::page_size;
use crate::page::PAGE_SIZE;

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
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use rustix::fs::MemfdFlags;

    use super::*;
    use crate::huge::tests::{HUGE, huge_file};

    #[test]
    fn other_files_are_written_at_any_offset() {
        let memfd = rustix::fs::memfd_create("small", MemfdFlags::CLOEXEC).unwrap();
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

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file's bytes in this process's addresses: large reads and searches use them, and save the
//! system call, and a search also the copy.
//!
//! The file may shrink, and its disk may fail, at any moment: so there is no reference into it, and
//! the guarded loads of [`kvmmem_sys::foreign`] turn the SIGBUS into an error. Where a file cannot
//! be mapped (some file systems, a limit of the address space) it is read by `pread`, which also
//! says why bytes cannot be read.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::OnceLock;

use kvmmem_sys::foreign::Foreign;
use kvmmem_sys::huge::page_size;
use rustix::fs::{SeekFrom, seek};

/// From this length on, a read costs less without the system call.
const MIN: usize = 64 << 10;

/// A file, mapped when that is first of use.
#[derive(Debug, Default)]
pub(super) struct FileMapping(OnceLock<Option<Foreign>>);

impl FileMapping {
    /// The memory of a file of `len` bytes; offsets in it are those in the file.
    pub(super) fn get(&self, file: &File, len: u64) -> Option<&Foreign> {
        self.0.get_or_init(|| map(file, len)).as_ref()
    }

    /// Reads from `offset` on, if that is of use; whether it was read.
    pub(super) fn read(&self, file: &File, len: u64, offset: u64, buf: &mut [u8]) -> bool {
        buf.len() >= MIN
            && is_data(file, offset, buf.len() as u64)
            && self.get(file, len).is_some_and(|memory| memory.read(offset, buf).is_ok())
    }
}

fn map(file: &File, len: u64) -> Option<Foreign> {
    let page = page_size(file.as_fd()).ok()?;
    let len = len.checked_next_multiple_of(page)?;
    let memory = Foreign::reserve(len, 0, false, page).ok()?;
    memory.place(0, len, file.as_fd(), 0).ok()?;
    Some(memory)
}

/// Whether the file has no hole there: in a hole of a file in memory (tmpfs), a page fault
/// allocates memory, and a read does not.
fn is_data(file: &File, offset: u64, len: u64) -> bool {
    seek(file, SeekFrom::Data(offset)).is_ok_and(|data| data == offset)
        && seek(file, SeekFrom::Hole(offset)).is_ok_and(|hole| hole - offset >= len)
}

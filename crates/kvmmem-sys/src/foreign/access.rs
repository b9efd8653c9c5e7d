// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Accesses to foreign memory: copies, words, and what the system has of it.

use core::arch::x86_64::_MM_HINT_T0;

use rustix::io::Errno;
use rustix::mm::Advice;

use super::{Foreign, ForeignError};
use crate::guarded::{self, Word};
use crate::page::PAGE_SIZE;

impl Foreign {
    /// Copies `buf.len()` bytes from `offset` on. While the other machine writes, the copy may mix
    /// old and new bytes.
    ///
    /// # Errors
    /// [`ForeignError`]; with [`ForeignError::Lost`], the bytes before the one that it names have
    /// been copied.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ForeignError> {
        let at = self.check(offset, buf.len())?;
        // SAFETY: the range lies within this object's mapping, as checked above, which is readable
        // and stays until this object is dropped; `buf` is valid for writes; `check` has
        // prepared the thread.
        let left = unsafe {
            let load =
                if self.is_write_combining { guarded::load_write_combining } else { guarded::load };
            load(buf.as_mut_ptr(), self.pointer(at), buf.len())
        };
        copied(offset, buf.len(), left)
    }

    /// Copies `bytes` to `offset` on.
    ///
    /// # Errors
    /// As [`Foreign::read`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), ForeignError> {
        let at = self.check_write(offset, bytes.len())?;
        // SAFETY: the range lies within this object's mapping, which is writable, both as checked
        // above, and stays until this object is dropped; no reference into it exists that a
        // write could break. `bytes` is valid for reads, and `check` has prepared the
        // thread.
        let left = unsafe { guarded::store(self.pointer(at), bytes.as_ptr(), bytes.len()) };
        copied(offset, bytes.len(), left)
    }

    /// Says which pages of a stretch are in memory, where reading them allocates none: one entry of
    /// `pages` for each, the lowest bit set if so. `offset` is a multiple of the page size.
    ///
    /// # Errors
    /// The system's; `EINVAL` for what leaves this one.
    pub fn resident(&self, offset: u64, pages: &mut [u8]) -> Result<(), Errno> {
        let len = pages.len().checked_mul(PAGE_SIZE).ok_or(Errno::INVAL)?;
        let at = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
        at.checked_add(len).filter(|end| *end <= self.len).ok_or(Errno::INVAL)?;
        // SAFETY: the kernel writes one byte a page to `pages`, which has that many; of the memory
        // it only asks for its state.
        match unsafe { libc::mincore(self.pointer(at).cast(), len, pages.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        }
    }

    /// Makes the system map what `len` bytes from `offset` on hold, both multiples of the page
    /// size, so that the accesses that follow fault less. Pages that the file does not have yet
    /// are allocated, as by reading.
    ///
    /// # Errors
    /// The system's; `EINVAL` for what leaves this one. Nothing depends on its success.
    pub fn populate(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let at = self.pages(offset, len)?;
        // SAFETY: the range lies within this object's own mapping. This advice fills in page tables
        // as reads would; it changes neither what is mapped nor what that holds.
        unsafe {
            rustix::mm::madvise(
                at.cast(),
                usize::try_from(len).unwrap_or(0),
                Advice::LinuxPopulateRead,
            )
        }
    }

    /// Takes what `len` bytes from `offset` on hold, both multiples of the page size, out of this
    /// process's page tables. The memory itself stays as it is, and the next access maps it
    /// again. Memory that is gone through once is undone like this by the thread that did so,
    /// while its page tables are in the caches, and not at the end by one alone.
    ///
    /// # Errors
    /// As [`Foreign::populate`].
    pub fn release(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let at = self.pages(offset, len)?;
        // SAFETY: the range lies within this object's own mapping, which is shared by the
        // invariant, so that the advice drops page table entries and no contents: what is
        // mapped stays the same. No reference into it exists.
        unsafe {
            rustix::mm::madvise(at.cast(), usize::try_from(len).unwrap_or(0), Advice::LinuxDontNeed)
        }
    }

    /// The address of a part of this one.
    fn pages(&self, offset: u64, len: u64) -> Result<*mut u8, Errno> {
        let is_within = offset.checked_add(len).is_some_and(|end| end <= self.len());
        let is_here = is_within && !self.is_left_out();
        let at = usize::try_from(offset).ok().filter(|_| is_here).ok_or(Errno::INVAL)?;
        Ok(self.pointer(at))
    }

    /// Begins to load what is at `offset` into the processor's cache.
    #[inline]
    pub fn prefetch(&self, offset: u64) {
        let Ok(at) = usize::try_from(offset) else { return };
        // SAFETY: the instruction is a hint, which no address makes fault or changes anything by.
        unsafe {
            core::arch::x86_64::_mm_prefetch::<_MM_HINT_T0>(self.pointer(at).cast_const().cast())
        };
    }

    /// Reads the word at `offset`, a multiple of its size, in one access.
    ///
    /// # Errors
    /// [`ForeignError`].
    pub fn read_word<W: Word>(&self, offset: u64) -> Result<W, ForeignError> {
        let at = self.check_word::<W>(offset, self.check(offset, W::SIZE)?)?;
        // SAFETY: the word lies within this object's mapping and is aligned, as checked above and
        // because the mapping is aligned to pages; it is readable and stays until this
        // object is dropped. `check` has prepared the thread.
        unsafe { guarded::load_word(self.pointer(at)) }.ok_or(ForeignError::Lost { offset })
    }

    /// Writes the word at `offset`, a multiple of its size, in one access.
    ///
    /// # Errors
    /// [`ForeignError`].
    pub fn write_word<W: Word>(&self, offset: u64, word: W) -> Result<(), ForeignError> {
        let at = self.check_word::<W>(offset, self.check_write(offset, W::SIZE)?)?;
        // SAFETY: the word lies within this object's mapping and is aligned, as checked above and
        // because the mapping is aligned to pages; it is writable, as checked above, and
        // stays until this object is dropped. No reference into it exists that a write
        // could break. `check` has prepared the thread.
        unsafe { guarded::store_word(self.pointer(at), word) }.ok_or(ForeignError::Lost { offset })
    }

    /// The offset as a number of this process, if the access stays inside and this thread may make
    /// it.
    #[inline]
    pub(super) fn check(&self, offset: u64, len: usize) -> Result<usize, ForeignError> {
        let outside = ForeignError::Outside { offset, len, size: self.len() };
        let at = usize::try_from(offset).map_err(|_| outside)?;
        at.checked_add(len).filter(|end| *end <= self.len).ok_or(outside)?;
        guarded::prepare().map_err(ForeignError::Guard)?;
        Ok(at)
    }

    #[inline]
    fn check_write(&self, offset: u64, len: usize) -> Result<usize, ForeignError> {
        if !self.is_writable {
            return Err(ForeignError::ReadOnly);
        }
        self.check(offset, len)
    }

    #[inline]
    fn check_word<W: Word>(&self, offset: u64, at: usize) -> Result<usize, ForeignError> {
        if at.is_multiple_of(W::SIZE) {
            Ok(at)
        } else {
            Err(ForeignError::Unaligned { offset, size: W::SIZE })
        }
    }
}

pub(super) fn copied(offset: u64, len: usize, left: usize) -> Result<(), ForeignError> {
    match left {
        0 => Ok(()),
        left => Err(ForeignError::Lost { offset: offset + (len - left) as u64 }),
    }
}

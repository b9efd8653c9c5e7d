// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mappings behind a guest's windows: a range of another VM's memory file, or the poison that
//! replaces it when a view ends.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::foreign::nothing;
use crate::huge::page_size;
use crate::map_over::map_over;
use crate::ram::PAGE_SIZE;

/// Length and alignment of a large page, bytes.
pub const LARGE_PAGE: u64 = 2 << 20;

/// Length and alignment of a giant page, bytes.
pub const GIANT_PAGE: u64 = 1 << 30;

/// The alignment at which a range of `len` bytes keeps the largest pages that fit in it, bytes.
pub const fn alignment(len: u64) -> u64 {
    if len >= GIANT_PAGE {
        GIANT_PAGE
    } else if len >= LARGE_PAGE {
        LARGE_PAGE
    } else {
        PAGE_SIZE
    }
}

/// What a guest may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read. The mapping is `PROT_READ`, so neither can this process write.
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

impl Access {
    fn protection(self) -> ProtFlags {
        match self {
            Self::ReadOnly => ProtFlags::READ,
            Self::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        }
    }
}

/// Why a mapping could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The range is empty, unaligned, or longer than an address space.
    #[error("offset {offset:#x} and length {len:#x} are not a range of whole pages")]
    Range {
        /// The offset asked for.
        offset: u64,
        /// The length asked for.
        len: u64,
    },
    /// No address space of that length could be reserved.
    #[error("cannot reserve {len:#x} bytes of address space")]
    Reserve {
        /// The length.
        len: usize,
        /// Why.
        source: io::Error,
    },
    /// It is not known what pages the file has.
    #[error("cannot examine the file to map")]
    Examine {
        /// Why.
        source: io::Error,
    },
    /// The file could not be mapped.
    #[error("cannot map {len:#x} bytes at offset {offset:#x}")]
    Map {
        /// The offset.
        offset: u64,
        /// The length.
        len: usize,
        /// Why.
        source: io::Error,
    },
    /// A memory file could not be made.
    #[error("cannot make a memory file of {len:#x} bytes")]
    Create {
        /// Its length.
        len: u64,
        /// Why.
        source: io::Error,
    },
}

/// A stretch of this process's address space that it owns and gives to a guest; unmapped when
/// dropped.
///
/// No reference to its contents is ever made: others write there at any time.
#[derive(Debug)]
pub struct GuestMapping {
    /// Aligned to `page`.
    start: NonNull<c_void>,
    /// A multiple of `page`, not zero.
    mapped: usize,
    /// What is for the guest begins so far behind `start`, a multiple of 4096,
    head: usize,
    /// and has this length, a multiple of 4096, not zero. It ends within what is mapped.
    len: usize,
    /// Length of the pages that the kernel maps and unmaps: 4096, or that of a file's huge pages.
    page: usize,
    access: Access,
}

// SAFETY: the mapping belongs to the process, not to a thread, and the only methods that touch its
// contents or replace it take `&mut self`.
unsafe impl Send for GuestMapping {}
// SAFETY: the methods that take `&self` return its numbers or advise on its range, which is the
// process's and whose contents they do not touch: they may be called from any threads at once.
unsafe impl Sync for GuestMapping {}

impl GuestMapping {
    /// Maps `len` bytes at `offset` of `fd`, shared, at an address congruent to `offset` modulo
    /// [`alignment`]. Of a file of huge pages it maps those that the range touches, and keeps
    /// what is before and behind it to itself.
    ///
    /// The file must not shrink while it is mapped: an access beyond its end kills a VMM by SIGBUS,
    /// or ends its `KVM_RUN`.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn of_file(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        access: Access,
    ) -> Result<Self, MappingError> {
        let range = MappingError::Range { offset, len };
        if !offset.is_multiple_of(PAGE_SIZE) {
            return Err(range);
        }
        let page =
            page_size(fd).map_err(|source| MappingError::Examine { source: source.into() })?;
        let mapping = Self::reserve(len, offset, access, page)?;
        let failed = |source: rustix::io::Errno| MappingError::Map {
            offset,
            len: mapping.len,
            source: source.into(),
        };
        // SAFETY: `mapping` owns these `mapped` bytes and no other code knows them; their number is
        // a multiple of the file's page size.
        unsafe {
            map_over(
                mapping.start.as_ptr(),
                mapping.mapped,
                access.protection(),
                (fd, offset - offset % page),
                (nothing().map_err(failed)?, 0),
            )
        }
        .map_err(failed)?;
        mapping.advise();
        Ok(mapping)
    }

    /// Poison of `len` bytes: what a guest gets in the place of memory that was taken from it. It
    /// never faults.
    ///
    /// Read-only poison is zeros. Writable poison takes what is written, and shows it again
    /// wherever `file` repeats.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn poison(len: u64, access: Access, file: &PoisonFile) -> Result<Self, MappingError> {
        let mut mapping = Self::reserve(len, 0, access, PAGE_SIZE)?;
        mapping.poison_in_place(file)?;
        Ok(mapping)
    }

    /// Replaces the contents with poison, at once for all users of the mapping.
    ///
    /// # Errors
    /// [`MappingError::Map`]; a part may be poison already.
    pub fn poison_in_place(&mut self, file: &PoisonFile) -> Result<(), MappingError> {
        let failed = |len| {
            move |source: rustix::io::Errno| MappingError::Map {
                offset: 0,
                len,
                source: source.into(),
            }
        };
        if self.access == Access::ReadOnly {
            // SAFETY: the range is this mapping's own, and no reference to its contents exists.
            unsafe {
                mmap_anonymous(
                    self.start.as_ptr(),
                    self.mapped,
                    ProtFlags::READ,
                    MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                )
            }
            .map_err(failed(self.mapped))?;
            return Ok(());
        }
        // A huge page is replaced as a whole or not at all.
        let chunk = file.chunk_for(self.mapped).next_multiple_of(self.page);
        let mut done = 0;
        while done < self.mapped {
            let len = chunk.min(self.mapped - done);
            // SAFETY: `done + len` is at most `self.mapped`, so the part lies within this mapping,
            // and MAP_FIXED replaces nothing else; no reference to its contents exists.
            unsafe {
                mmap(
                    self.start.as_ptr().wrapping_byte_add(done),
                    len,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                    &file.file,
                    0,
                )
            }
            .map_err(failed(len))?;
            done += len;
        }
        Ok(())
    }

    /// Stores `value` as little-endian at word `index` (8 bytes each); false beyond the end or in a
    /// read-only mapping. Concurrent readers see the old or the new word.
    pub fn store_word(&mut self, index: usize, value: u64) -> bool {
        let at =
            index.checked_mul(8).filter(|at| at.checked_add(8).is_some_and(|end| end <= self.len));
        let (Some(at), Access::ReadWrite) = (at, self.access) else {
            return false;
        };
        let word = self.start.as_ptr().wrapping_byte_add(self.head + at).cast::<u64>();
        // SAFETY: the 8 bytes lie within this writable mapping and are aligned, since its start and
        // `head` are page-aligned. The exclusive borrow keeps this process's other threads
        // from storing there; other readers are outside of it.
        unsafe { word.write_volatile(value.to_le()) };
        true
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What a guest may do with it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Its first address.
    pub fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64 + self.head as u64
    }

    /// Address space of `len` bytes, inaccessible yet, congruent to `offset` modulo the alignment
    /// for that length and modulo `page`, with the rest of the pages of that length that they
    /// touch.
    fn reserve(len: u64, offset: u64, access: Access, page: u64) -> Result<Self, MappingError> {
        let range = MappingError::Range { offset, len };
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) {
            return Err(range);
        }
        let head = offset % page;
        let mapped = len.checked_add(head).and_then(|len| len.checked_next_multiple_of(page));
        let Some(mapped) = mapped else { return Err(range) };
        let size =
            |bytes: u64| usize::try_from(bytes).map_err(|_| MappingError::Range { offset, len });
        let (bytes, mapped, head) = (size(len)?, size(mapped)?, size(head)?);
        let (page, alignment) = (size(page)?, size(alignment(len).max(page))?);
        let Some(total) =
            mapped.checked_add(alignment).filter(|total| isize::try_from(*total).is_ok())
        else {
            return Err(range);
        };
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nothing uses.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                total,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|source| MappingError::Reserve { len: total, source: source.into() })?;
        // The alignment is a power of two, so the remainder is exact.
        #[allow(clippy::cast_possible_truncation)]
        let before =
            (offset as usize).wrapping_sub(head).wrapping_sub(start.addr()) & (alignment - 1);
        let address = start.wrapping_byte_add(before);
        // SAFETY: these are the parts of the reservation before and behind the `mapped` bytes that
        // are kept: its start and the alignment's remainder are page-aligned, and before <
        // alignment. Failing leaves address space unused.
        unsafe {
            if before > 0 {
                let _ = munmap(start, before);
            }
            let _ = munmap(address.wrapping_byte_add(mapped), alignment - before);
        }
        let start = NonNull::new(address).ok_or(MappingError::Range { offset, len })?;
        Ok(Self { start, mapped, head, len: bytes, page, access })
    }

    /// Asks for large pages, and for no copy of another VM's memory in core dumps or children.
    /// Refusals are ignored.
    fn advise(&self) {
        for advice in [Advice::LinuxHugepage, Advice::LinuxDontDump, Advice::LinuxDontFork] {
            // SAFETY: the range is this mapping's own, and none of these changes what the mapping
            // holds.
            let _ = unsafe { madvise(self.start.as_ptr(), self.mapped, advice) };
        }
    }
}

impl Drop for GuestMapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's own and no reference to its contents exists. A guest
        // that could reach it would have it inside of a `Memslot`, which lets it go only
        // after KVM has.
        let _ = unsafe { munmap(self.start.as_ptr(), self.mapped) };
    }
}

/// The memory behind writable poison: one small sparse file, mapped over and over, so that writing
/// to terabytes of poison fills no more than the file.
#[derive(Debug)]
pub struct PoisonFile {
    file: File,
}

impl PoisonFile {
    /// Length of the file for mappings of up to [`PoisonFile::MOST_PARTS`] times as much.
    const CHUNK: usize = 64 << 20;

    /// The most mappings that one mapping's poison takes: the process has a limit on them
    /// (`vm.max_map_count`).
    const MOST_PARTS: usize = 256;

    /// The longest file, for poison of any length.
    const FILE_LEN: u64 = 1 << 40;

    /// A file that takes no memory yet.
    ///
    /// # Errors
    /// [`MappingError::Create`].
    pub fn new() -> Result<Self, MappingError> {
        memory_file("kvmmem-poison", Self::FILE_LEN).map(|file| Self { file })
    }

    /// How much of the file is repeated in poison of `len` bytes.
    fn chunk_for(&self, len: usize) -> usize {
        let least = len.div_ceil(Self::MOST_PARTS).next_multiple_of(Self::CHUNK);
        least.max(Self::CHUNK)
    }
}

/// A sparse memory file of fixed length.
///
/// # Errors
/// [`MappingError::Create`].
pub fn memory_file(name: &str, len: u64) -> Result<File, MappingError> {
    let create = |source: rustix::io::Errno| MappingError::Create { len, source: source.into() };
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(create)?;
    rustix::fs::ftruncate(&fd, len).map_err(create)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(create)?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests;

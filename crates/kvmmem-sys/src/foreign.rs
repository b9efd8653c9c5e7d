// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Foreign mappings: an address range of this process that maps another virtual machine's memory.
//!
//! `kvmmem::Mapping` is built on it. The memory may change or be removed at any moment. So there is
//! never a reference into it, and only the guarded routines (`guarded`) access it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::guarded;
pub use crate::guarded::Word;
use crate::huge::page_size;
use crate::map_over::map_over;
use crate::page::PAGE_SIZE;

const HUGE_2M: u64 = 2 << 20;
const HUGE_1G: u64 = 1 << 30;

/// Why foreign memory was not accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForeignError {
    /// The access leaves the stretch.
    #[error("access at offset {offset:#x}, length {len:#x}, leaves the mapping of {size:#x} bytes")]
    Outside {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: usize,
        /// The stretch's length in bytes.
        size: u64,
    },
    /// A word's offset is not a multiple of its size.
    #[error("offset {offset:#x} is not a multiple of {size}")]
    Unaligned {
        /// Offset in bytes.
        offset: u64,
        /// The word's size in bytes.
        size: usize,
    },
    /// The stretch is mapped for reading only.
    #[error("the mapping is read-only")]
    ReadOnly,
    /// The memory is not there, or not any more.
    #[error("the memory at offset {offset:#x} is gone")]
    Lost {
        /// Offset in bytes of the first byte that was not copied.
        offset: u64,
    },
    /// SIGBUS and SIGILL cannot be handled on this thread.
    #[error("cannot handle SIGBUS and SIGILL")]
    Guard(#[source] Errno),
}

/// Foreign memory at a fixed place, for every thread of the process.
///
/// # Invariants
///
/// The addresses from `base` to `base + len` are a whole number of pages which this object alone
/// mapped and which stay mapped until it is dropped, each one shared from some file, readable, and
/// writable if `is_writable`. (Of which file may change: [`Foreign::place`] and [`Foreign::clear`]
/// replace one mapping by another in one step. A process that is forked from `left_out_of` lacks
/// them, and may have something else there.) An access to a page that the file does not have
/// raises SIGBUS, or SIGILL in memory of a PCI device that is gone. Only the guarded routines
/// access them.
///
/// The same holds for `before` bytes before them and `behind` bytes behind them, which are the rest
/// of the huge pages in which they lie, if any: those are never accessed.
#[derive(Debug)]
pub struct Foreign {
    base: NonNull<u8>,
    len: usize,
    before: usize,
    behind: usize,
    is_writable: bool,
    is_write_combining: bool,
    /// The process whose children have none of it; 0 where they have all.
    left_out_of: AtomicU32,
}

// SAFETY: nothing about a mapping depends on the thread that made it.
unsafe impl Send for Foreign {}

// SAFETY: the memory is no object of this program: by the invariant it is reached through the
// guarded routines alone, which are machine code that tolerates any concurrent change, be it from
// another virtual machine or another thread; replacing a mapping is one system call, and the only
// field that changes is atomic.
unsafe impl Sync for Foreign {}

impl Foreign {
    /// Reserves `len` bytes, a positive multiple of the page size, at an address that is congruent
    /// to `like` modulo 2 MiB, or 1 GiB if there is that much, so that large pages fit. Every
    /// access is lost until something is placed there. `page` is the length of the largest
    /// pages that files to be placed have ([`page_size`]): if it is more than 4096, `like` is
    /// the offset in such a file.
    ///
    /// # Errors
    /// The system's; `EINVAL` for a bad length.
    pub fn reserve(len: u64, like: u64, is_writable: bool, page: u64) -> Result<Self, Errno> {
        guarded::prepare()?;
        let small = PAGE_SIZE as u64;
        if !page.is_power_of_two() || page < small {
            return Err(Errno::INVAL);
        }
        let like = like & !(small - 1);
        let alignment = match len {
            HUGE_1G.. => HUGE_1G,
            HUGE_2M.. => HUGE_2M,
            _ => small,
        };
        let alignment = alignment.max(page);
        if len == 0 || !len.is_multiple_of(small) {
            return Err(Errno::INVAL);
        }
        let size = |bytes: u64| usize::try_from(bytes).map_err(|_| Errno::NOMEM);
        // From the start of the first huge page to the end of the last one.
        let before = like % page;
        let whole = before
            .checked_add(len)
            .and_then(|len| len.checked_next_multiple_of(page))
            .ok_or(Errno::NOMEM)?;
        let room = size(whole.checked_add(alignment).ok_or(Errno::NOMEM)?)?;
        // SAFETY: with a null hint and without MAP_FIXED the kernel picks a free range, so no
        // existing mapping, and with it no Rust object, is touched.
        let start = unsafe {
            rustix::mm::mmap(
                core::ptr::null_mut(),
                room,
                protection(is_writable),
                MapFlags::SHARED | MapFlags::NORESERVE,
                nothing()?,
                0,
            )
        }?;
        let (start, whole) = (start.cast::<u8>(), size(whole)?);
        let head = size((like - before).wrapping_sub(start.addr() as u64) & (alignment - 1))?;
        let tail = start.wrapping_add(head + whole);
        for (part, bytes) in [(start, head), (tail, room - head - whole)] {
            if bytes > 0 {
                // SAFETY: a part of what was just mapped, whose address no other code knows; the
                // rest is kept. Should it fail, addresses are wasted, nothing else.
                let _ = unsafe { rustix::mm::munmap(part.cast(), bytes) };
            }
        }
        let (before, len) = (size(before)?, size(len)?);
        let base = NonNull::new(start.wrapping_add(head + before)).ok_or(Errno::NOMEM)?;
        // INVARIANT: mapped just now, shared, from the empty file; `whole` is `before`, `len` and
        // the rest.
        let behind = whole - before - len;
        let left_out_of = AtomicU32::new(0);
        Ok(Self { base, len, before, behind, is_writable, is_write_combining: false, left_out_of })
    }

    /// Says that files to be placed have memory that may be write-combining, where ordinary loads
    /// are slow: bytes are copied by other loads, and searches search copies.
    #[must_use]
    pub fn write_combining(mut self) -> Self {
        self.is_write_combining = true;
        self
    }

    /// Leaves what was placed until now out of processes that are forked from this one: an access
    /// raises SIGSEGV there.
    ///
    /// # Errors
    /// The system's.
    pub fn keep_from_children(&self) -> Result<(), Errno> {
        let (address, len) = self.whole();
        if self.is_left_out() {
            return Err(Errno::INVAL);
        }
        // Before there can be a child that lacks a part.
        self.left_out_of.store(std::process::id(), Ordering::Relaxed);
        // SAFETY: the range is this object's own by its invariant. The advice changes nothing in
        // this process: it says what fork does.
        unsafe { rustix::mm::madvise(address.cast(), len, Advice::LinuxDontFork) }
    }

    /// Whether this process is a child that was to have none of it: its own memory may be there.
    fn is_left_out(&self) -> bool {
        let process = self.left_out_of.load(Ordering::Relaxed);
        process != 0 && process != std::process::id()
    }

    /// Maps `len` bytes of `file` from `file_offset` on at `offset`, in the place of what is there.
    /// All three are multiples of 4096. Where a file of huge pages begins or ends within one,
    /// it must be at the stretch's start or end.
    ///
    /// # Errors
    /// The system's, `EINVAL` for what leaves the stretch, `EOPNOTSUPP` where a file's huge pages
    /// do not fit; what was there is there still, or lost where memory is short.
    pub fn place(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> Result<(), Errno> {
        let (address, len, file_offset) = self.range(offset, len, file, file_offset)?;
        // SAFETY: `range` lies within this object's own by its invariant, and in whole pages of the
        // file. The new mapping is shared and has the same protection, which keeps the invariant.
        // No reference to that memory exists.
        unsafe {
            map_over(
                address.cast(),
                len,
                protection(self.is_writable),
                (file, file_offset),
                (nothing()?, 0),
            )
        }
    }

    /// What [`Foreign::place`] replaces and by what: the first address, the length, and the offset
    /// in the file, all in whole pages of it.
    fn range(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> Result<(*mut u8, usize, u64), Errno> {
        let page = PAGE_SIZE as u64;
        let end = offset.checked_add(len).filter(|end| *end <= self.len());
        let (Some(_), Ok(at), Ok(size)) = (end, usize::try_from(offset), usize::try_from(len))
        else {
            return Err(Errno::INVAL);
        };
        let is_whole = len > 0 && offset.is_multiple_of(page) && len.is_multiple_of(page);
        if !is_whole || self.is_left_out() {
            return Err(Errno::INVAL);
        }
        let huge = page_size(file)?;
        let head = file_offset % huge;
        let whole = head.checked_add(len).and_then(|len| len.checked_next_multiple_of(huge));
        let tail = whole.map_or(u64::MAX, |whole| whole - head - len);
        let (Ok(before), Ok(behind)) = (usize::try_from(head), usize::try_from(tail)) else {
            return Err(Errno::OPNOTSUPP);
        };
        let fits_before = before == 0 || (at == 0 && before <= self.before);
        let fits_behind = behind == 0 || (at + size == self.len && behind <= self.behind);
        let address = self.pointer(at).wrapping_sub(before);
        if !fits_before || !fits_behind || !(address.addr() as u64).is_multiple_of(huge) {
            return Err(Errno::OPNOTSUPP);
        }
        Ok((address, before + size + behind, file_offset - head))
    }

    /// Maps nothing at `address`, `len` bytes: a range of this object's, what is before and behind
    /// it included, in which whole pages fit of what is there. Of the file of nothing nothing is
    /// refused, so that this is one system call.
    fn empty(&self, address: *mut u8, len: usize) -> Result<(), Errno> {
        // SAFETY:
        // 1. The callers pass a range of pages that lies within this object's own, and whose length
        //    is a multiple of the file's page size, so that the kernel does not round it up:
        //    MAP_FIXED replaces nothing else. The new mapping is shared and has the same
        //    protection, which keeps the invariant.
        // 2. No reference to that memory exists, so no one relies on its contents staying the same.
        let mapped = unsafe {
            rustix::mm::mmap(
                address.cast(),
                len,
                protection(self.is_writable),
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                nothing()?,
                0,
            )
        };
        mapped.map(drop)
    }

    /// Takes back what was placed from `offset` on, `len` bytes: from the return on, every access
    /// there is lost.
    ///
    /// # Errors
    /// As [`Foreign::place`]; `EINVAL` for a part of a huge page that is less than the stretch.
    pub fn clear(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let (address, len, _) = self.range(offset, len, nothing()?, 0)?;
        if (offset, len) == (0, self.len) {
            let (address, whole) = self.whole();
            return self.empty(address, whole);
        }
        self.empty(address, len)
    }

    /// All that is mapped: the first address and the length.
    fn whole(&self) -> (*mut u8, usize) {
        (self.pointer(0).wrapping_sub(self.before), self.before + self.len + self.behind)
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Address in this process.
    pub fn address(&self) -> usize {
        self.base.as_ptr().addr()
    }

    /// Whether it may be written.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Pointer to `offset`, which callers have checked; wrapping, so that it needs no unsafe.
    #[inline]
    fn pointer(&self, offset: usize) -> *mut u8 {
        self.base.as_ptr().wrapping_add(offset)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if self.is_left_out() {
            return;
        }
        let (address, len) = self.whole();
        // SAFETY: the range is this object's own by its invariant, no reference into it exists, and
        // the object is gone after this.
        let result = unsafe { rustix::mm::munmap(address.cast(), len) };
        debug_assert_eq!(result, Ok(()));
    }
}

fn protection(is_writable: bool) -> ProtFlags {
    if is_writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ }
}

/// A file without any page, which stays so: every access to a mapping of it raises SIGBUS. It is
/// made before there is anything to take back, so that taking back needs no file descriptor.
pub(crate) fn nothing() -> Result<BorrowedFd<'static>, Errno> {
    static NOTHING: OnceLock<Result<OwnedFd, Errno>> = OnceLock::new();
    let make = || {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("kvmmem-nothing", flags)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    };
    match NOTHING.get_or_init(make) {
        Ok(file) => Ok(file.as_fd()),
        Err(errno) => Err(*errno),
    }
}

mod access;
mod find;

#[cfg(test)]
mod tests;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copy buffer: a memfd that the broker and a tool share to pass copies of private RAM.
//!
//! To read, the broker fills it from `/proc/PID/mem` and the tool copies out of it; to write, the
//! roles are exchanged. The peer may write the buffer at any moment, so there is never a reference
//! into it. The broker accesses it by system calls only: a page that the peer has punched out is an
//! errno there, not a SIGBUS.

use std::arch::asm;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::huge::page_size;
use crate::page::PAGE_SIZE;

/// A memfd mapped into this process.
///
/// # Invariants
///
/// The addresses from `base` to `base + len` are a shared, writable mapping that this object alone
/// made and that stays until it is dropped, of a file that is at least that long and sealed against
/// shrinking. Only this module accesses them, by system calls and by inline assembly.
#[derive(Debug)]
pub struct CopyBuffer {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: nothing about a mapping depends on the thread that made it.
unsafe impl Send for CopyBuffer {}

// SAFETY: the memory is no object of this program: by the invariant only system calls and inline
// assembly access it, which tolerate any concurrent change, be it by the peer or by another thread,
// and no field ever changes.
unsafe impl Sync for CopyBuffer {}

impl CopyBuffer {
    /// Makes a memfd of `len` bytes with all of its memory, sealed as [`CopyBuffer::map`] demands,
    /// and maps it.
    ///
    /// # Errors
    /// The system's.
    pub fn create(len: usize) -> Result<(Self, OwnedFd), Errno> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("kvmmem-copies", flags)?;
        rustix::fs::ftruncate(&file, len as u64)?;
        // The peer writes to no memory that it would have to pay for.
        loop {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len as u64) {
                Err(Errno::INTR) => {}
                done => break done?,
            }
        }
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Self::map(file.as_fd(), len)?, file))
    }

    /// Maps the first `len` bytes of a memfd that the peer made.
    ///
    /// # Errors
    /// `EINVAL` where it is no memfd of small pages that is sealed against shrinking, long enough
    /// and allocated; the system's.
    pub fn map(file: BorrowedFd<'_>, len: usize) -> Result<Self, Errno> {
        /// Bytes of a block of `st_blocks`.
        const BLOCK: u64 = 512;
        let seals = rustix::fs::fcntl_get_seals(file)?;
        let stat = rustix::fs::fstat(file)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(BLOCK);
        let fits = len > 0 && len.is_multiple_of(PAGE_SIZE) && size.min(allocated) >= len as u64;
        if !seals.contains(SealFlags::SHRINK) || !fits || page_size(file)? != PAGE_SIZE as u64 {
            return Err(Errno::INVAL);
        }
        let (rights, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: with a null hint and without MAP_FIXED the kernel picks a free range, so no
        // existing mapping, and with it no Rust object, is touched.
        let base = unsafe { rustix::mm::mmap(core::ptr::null_mut(), len, rights, flags, file, 0) }?;
        // SAFETY: the range was mapped just now. The advice keeps copies of a guest's memory out of
        // core dumps, and changes nothing else.
        let _ = unsafe { rustix::mm::madvise(base, len, rustix::mm::Advice::LinuxDontDump) };
        let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)?;
        // INVARIANT: mapped just now; the seal cannot be removed.
        Ok(Self { base, len })
    }

    /// Fills up to `len` bytes from `at` on from a file, and returns how many.
    ///
    /// # Errors
    /// The system's; `EINVAL` for what leaves the buffer, `EFAULT` where the peer has taken its
    /// memory away.
    pub fn fill(
        &self,
        at: usize,
        len: usize,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<usize, Errno> {
        let to = self.pointer(at, len)?;
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::INVAL)?;
        // SAFETY: the kernel writes to `to` to `to + len`, which lies within this object's writable
        // mapping, as checked above, and which no reference points into. It checks each
        // access itself.
        let count = unsafe { libc::pread(raw(file), to.cast(), len, offset) };
        counted(count)
    }

    /// Writes up to `len` bytes from `at` on to a file, and returns how many.
    ///
    /// # Errors
    /// As [`CopyBuffer::fill`].
    pub fn drain(
        &self,
        at: usize,
        len: usize,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<usize, Errno> {
        let from = self.pointer(at, len)?;
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::INVAL)?;
        // SAFETY: `from` lies within this object's mapping for `len` bytes, as checked above, and
        // the kernel only reads there; no reference points into the mapping.
        let count = unsafe { libc::pwrite(raw(file), from.cast(), len, offset) };
        counted(count)
    }

    /// Copies out what is at `at`. For the process that made the memfd alone: in another one a page
    /// that is gone is a SIGBUS.
    ///
    /// # Errors
    /// `EINVAL` for what leaves the buffer.
    pub fn load(&self, at: usize, to: &mut [u8]) -> Result<(), Errno> {
        let from = self.pointer(at, to.len())?;
        // SAFETY: `from` lies within this object's mapping for that length, as checked above, and
        // `to` is valid for writes and does not overlap it, for no reference points into
        // the mapping.
        unsafe { copy(to.as_mut_ptr(), from, to.len()) };
        Ok(())
    }

    /// Copies `from` to `at`. As [`CopyBuffer::load`].
    ///
    /// # Errors
    /// `EINVAL` for what leaves the buffer.
    pub fn store(&self, at: usize, from: &[u8]) -> Result<(), Errno> {
        let to = self.pointer(at, from.len())?;
        // SAFETY: `to` lies within this object's mapping for that length, as checked above, and
        // `from` is valid for reads and does not overlap it, for no reference points into
        // the mapping.
        unsafe { copy(to, from.as_ptr(), from.len()) };
        Ok(())
    }

    /// Pointer to `at`, from which on there are `len` bytes; wrapping, so that it needs no unsafe.
    fn pointer(&self, at: usize, len: usize) -> Result<*mut u8, Errno> {
        at.checked_add(len).filter(|end| *end <= self.len).ok_or(Errno::INVAL)?;
        Ok(self.base.as_ptr().wrapping_add(at))
    }
}

impl Drop for CopyBuffer {
    fn drop(&mut self) {
        // SAFETY: the range is this object's own by its invariant, no reference into it exists, and
        // the object is gone after this.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert_eq!(result, Ok(()));
    }
}

/// Copies bytes that another process may write meanwhile: in assembly, where this is not a data
/// race.
///
/// # Safety
/// `from` to `from + len` may be read, `to` to `to + len` may be written, and they do not overlap.
unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the caller's; the instruction accesses nothing else, and the direction flag is clear
    // by the ABI.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
}

fn raw(file: BorrowedFd<'_>) -> libc::c_int {
    std::os::fd::AsRawFd::as_raw_fd(&file)
}

fn counted(count: libc::ssize_t) -> Result<usize, Errno> {
    usize::try_from(count)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = 2 * PAGE_SIZE;

    #[test]
    fn two_mappings_of_a_memfd_hold_the_same_bytes() {
        let (ours, file) = CopyBuffer::create(LEN).unwrap();
        let theirs = CopyBuffer::map(file.as_fd(), LEN).unwrap();
        drop(file);
        let source = rustix::fs::memfd_create("source", MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(rustix::io::pwrite(&source, b"eight by", 0), Ok(8));
        assert_eq!(theirs.fill(LEN - 5, 5, source.as_fd(), 3), Ok(5));
        let mut bytes = [0; 5];
        ours.load(LEN - 5, &mut bytes).unwrap();
        assert_eq!(&bytes, b"ht by");
        ours.store(1, b"zebra").unwrap();
        assert_eq!(theirs.drain(1, 5, source.as_fd(), 6), Ok(5));
        assert_eq!(rustix::io::pread(&source, &mut bytes, 6), Ok(5));
        assert_eq!(&bytes, b"zebra");
        assert_eq!(theirs.fill(0, 8, source.as_fd(), 100), Ok(0));
        for (at, len) in [(LEN, 1), (0, LEN + 1), (usize::MAX, 2)] {
            assert_eq!(theirs.fill(at, len, source.as_fd(), 0), Err(Errno::INVAL));
            assert_eq!(theirs.drain(at, len, source.as_fd(), 0), Err(Errno::INVAL));
        }
        assert_eq!(ours.load(LEN - 4, &mut bytes), Err(Errno::INVAL));
        assert_eq!(ours.store(usize::MAX, &bytes), Err(Errno::INVAL));
        assert_eq!(ours.fill(0, 1, source.as_fd(), u64::MAX), Err(Errno::INVAL));
    }

    #[test]
    fn files_that_could_end_or_are_not_there_are_refused() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("file", flags).unwrap();
        rustix::fs::ftruncate(&file, LEN as u64).unwrap();
        let mapped = |len| CopyBuffer::map(file.as_fd(), len).map(drop);
        assert_eq!(mapped(LEN), Err(Errno::INVAL));
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        // It has no memory yet.
        assert_eq!(mapped(LEN), Err(Errno::INVAL));
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, LEN as u64).unwrap();
        assert_eq!(mapped(LEN), Ok(()));
        for len in [0, 1, LEN + PAGE_SIZE] {
            assert_eq!(mapped(len), Err(Errno::INVAL));
        }
        rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        assert_eq!(mapped(LEN), Err(Errno::PERM));
        let null = std::fs::File::options().read(true).write(true).open("/dev/null").unwrap();
        assert_eq!(CopyBuffer::map(null.as_fd(), LEN).map(drop), Err(Errno::INVAL));
    }

    #[test]
    fn memory_that_the_peer_takes_away_harms_nobody() {
        let (_ours, file) = CopyBuffer::create(LEN).unwrap();
        let theirs = CopyBuffer::map(file.as_fd(), LEN).unwrap();
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, hole, 0, LEN as u64).unwrap();
        let null = std::fs::File::options().read(true).write(true).open("/dev/zero").unwrap();
        assert_eq!(theirs.fill(0, LEN, null.as_fd(), 0), Ok(LEN));
        assert_eq!(theirs.drain(0, LEN, null.as_fd(), 0), Ok(LEN));
    }
}

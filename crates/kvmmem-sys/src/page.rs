// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A page of this process that `/dev/kvmmem` may replace with a page of another virtual machine.
//!
//! `kvmmem::MappedPage` is built on it. After MAP the other virtual machine may change the bytes
//! between any two instructions. So there is never a reference into the page; all accesses are
//! volatile, a word at a time if the offset allows it.

use core::ffi::c_void;
use core::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Size in bytes of a page.
pub const PAGE_SIZE: usize = 4096;

/// Why a page could not be made or accessed.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// `mmap` refused.
    #[error("cannot map an anonymous page")]
    Map(#[source] Errno),
    /// `madvise` refused.
    #[error("cannot prepare the page at {address:#x} ({advice})")]
    Advise {
        /// Address of the page.
        address: usize,
        /// What was asked for.
        advice: &'static str,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// An access past the end of the page.
    #[error("access at offset {offset:#x}, length {len:#x}, leaves the page")]
    Outside {
        /// Offset in bytes into the page.
        offset: usize,
        /// Length in bytes.
        len: usize,
    },
    /// A word access at an offset that is not a multiple of its size.
    #[error("offset {offset:#x} is not a multiple of 8")]
    Unaligned {
        /// Offset in bytes into the page.
        offset: usize,
    },
}

/// A private anonymous page, present and writable, unmapped on drop.
///
/// The kernel's fork and core dump pass it by: a child gets a page of zeros at the same address
/// (`MADV_WIPEONFORK`). `MADV_DONTFORK` would serve as well against copying the other machine's
/// memory into the child, but would leave a gap there, in which the child could come to map
/// something else that this object, inherited, would then unmap.
///
/// # Invariants
///
/// `base` is the page-aligned start of one page that this object alone mapped, readable and
/// writable, and that stays mapped until it is dropped. No reference into the page ever exists.
//
// It is `Send` but not `Sync`: volatile access by two threads of this process at once would be a
// data race.
#[derive(Debug)]
pub struct Page {
    base: NonNull<u8>,
}

// SAFETY: nothing about a mapping depends on the thread that made it, and the raw pointer is used
// only through the object, which moves as a whole.
unsafe impl Send for Page {}

impl Page {
    /// Maps a page of zeros and faults it in.
    ///
    /// # Errors
    /// [`PageError::Map`], [`PageError::Advise`]: mostly for want of memory.
    pub fn new() -> Result<Self, PageError> {
        // SAFETY: with a null hint and without MAP_FIXED the kernel picks a free range, so no
        // existing mapping, and with it no Rust object, is touched.
        let address = unsafe {
            rustix::mm::mmap_anonymous(
                core::ptr::null_mut(),
                PAGE_SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(PageError::Map)?;
        let base = NonNull::new(address.cast::<u8>()).ok_or(PageError::Map(Errno::NOMEM))?;
        // INVARIANT: the page was mapped just now, and no other code knows its address.
        let page = Self { base };
        page.advise(Advice::LinuxWipeOnFork, "MADV_WIPEONFORK")?;
        page.advise(Advice::LinuxDontDump, "MADV_DONTDUMP")?;
        page.advise(Advice::LinuxPopulateWrite, "MADV_POPULATE_WRITE")?;
        Ok(page)
    }

    /// Address of the page in this process: what the driver calls the gva.
    pub fn address(&self) -> usize {
        self.base.as_ptr().expose_provenance()
    }

    /// Copies `buf.len()` bytes from `offset` on; while the other machine writes, the copy may mix
    /// old and new words.
    ///
    /// # Errors
    /// [`PageError::Outside`].
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), PageError> {
        check(offset, buf.len())?;
        let mut at = offset;
        let (head, words) = buf.split_at_mut(head_len(offset, buf.len()));
        for byte in head {
            *byte = self.load_byte(at);
            at += 1;
        }
        let mut words = words.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.load_word(at).to_ne_bytes());
            at += 8;
        }
        for byte in words.into_remainder() {
            *byte = self.load_byte(at);
            at += 1;
        }
        Ok(())
    }

    /// Copies `bytes` to `offset` on.
    ///
    /// # Errors
    /// [`PageError::Outside`].
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), PageError> {
        check(offset, bytes.len())?;
        let mut at = offset;
        let (head, words) = bytes.split_at(head_len(offset, bytes.len()));
        for &byte in head {
            self.store_byte(at, byte);
            at += 1;
        }
        let (words, tail) = words.as_chunks::<8>();
        for &word in words {
            self.store_word(at, u64::from_ne_bytes(word));
            at += 8;
        }
        for &byte in tail {
            self.store_byte(at, byte);
            at += 1;
        }
        Ok(())
    }

    /// Reads the word at `offset`, a multiple of 8, in one access.
    ///
    /// # Errors
    /// [`PageError::Outside`], [`PageError::Unaligned`].
    pub fn read_u64(&self, offset: usize) -> Result<u64, PageError> {
        check_word(offset)?;
        Ok(self.load_word(offset))
    }

    /// Writes the word at `offset`, a multiple of 8, in one access.
    ///
    /// # Errors
    /// [`PageError::Outside`], [`PageError::Unaligned`].
    pub fn write_u64(&self, offset: usize, value: u64) -> Result<(), PageError> {
        check_word(offset)?;
        self.store_word(offset, value);
        Ok(())
    }

    /// Gives the page up without unmapping it: its address is never used again in this process.
    pub fn leak(self) {
        core::mem::forget(self);
    }

    fn advise(&self, advice: Advice, name: &'static str) -> Result<(), PageError> {
        // SAFETY: the range is this object's page (its invariant), and the advices used here change
        // no byte of it that was ever written: they set flags for fork and core dump, and
        // fault the page in.
        unsafe { rustix::mm::madvise(self.pointer(0).cast::<c_void>(), PAGE_SIZE, advice) }
            .map_err(|source| PageError::Advise { address: self.address(), advice: name, source })
    }

    /// Pointer to `offset`, which callers have checked; wrapping, so that it needs no unsafe.
    fn pointer(&self, offset: usize) -> *mut u8 {
        self.base.as_ptr().wrapping_add(offset)
    }

    fn load_byte(&self, offset: usize) -> u8 {
        assert!(offset < PAGE_SIZE);
        // SAFETY: in the page by the line above, and the page is mapped and readable by the
        // invariant. A byte of any value is a u8. `Page` is not `Sync`, so no other thread
        // of this process accesses it; writers in the other virtual machine are outside of
        // the program, which is what volatile is for.
        unsafe { self.pointer(offset).read_volatile() }
    }

    fn store_byte(&self, offset: usize, value: u8) {
        assert!(offset < PAGE_SIZE);
        // SAFETY: in the page by the line above, and the page is mapped and writable by the
        // invariant. `Page` is not `Sync`, so no other thread of this process accesses it,
        // and no reference into it exists that a write could break.
        unsafe { self.pointer(offset).write_volatile(value) }
    }

    fn load_word(&self, offset: usize) -> u64 {
        assert!(offset <= PAGE_SIZE - 8 && offset.is_multiple_of(8));
        // SAFETY: the word lies in the page as a whole, and is aligned, by the line above and
        // because the page is, which is mapped and readable by the invariant. Bytes of any
        // value are a u64. `Page` is not `Sync`, so no other thread of this process
        // accesses it; writers in the other virtual machine are outside of the program.
        unsafe { self.pointer(offset).cast::<u64>().read_volatile() }
    }

    fn store_word(&self, offset: usize, value: u64) {
        assert!(offset <= PAGE_SIZE - 8 && offset.is_multiple_of(8));
        // SAFETY: the word lies in the page as a whole, and is aligned, by the line above and
        // because the page is, which is mapped and writable by the invariant. `Page` is not
        // `Sync`, so no other thread of this process accesses it, and no reference into it
        // exists that a write could break.
        unsafe { self.pointer(offset).cast::<u64>().write_volatile(value) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the range is this object's own page by its invariant, no reference into it
        // exists, and the object is gone after this.
        let result = unsafe { rustix::mm::munmap(self.pointer(0).cast::<c_void>(), PAGE_SIZE) };
        debug_assert_eq!(result, Ok(()));
    }
}

/// Bytes up to the next multiple of 8, at most `len`.
fn head_len(offset: usize, len: usize) -> usize {
    (offset.next_multiple_of(8) - offset).min(len)
}

fn check(offset: usize, len: usize) -> Result<(), PageError> {
    match offset.checked_add(len) {
        Some(end) if end <= PAGE_SIZE => Ok(()),
        _ => Err(PageError::Outside { offset, len }),
    }
}

fn check_word(offset: usize) -> Result<(), PageError> {
    check(offset, 8)?;
    if offset.is_multiple_of(8) { Ok(()) } else { Err(PageError::Unaligned { offset }) }
}

#[cfg(test)]
mod tests;

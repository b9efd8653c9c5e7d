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
        // INVARIANT: the page was mapped just now, and nobody else knows its address.
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
mod tests {
    use super::*;

    #[test]
    fn a_new_page_is_aligned_and_zero() {
        let page = Page::new().unwrap();
        assert!(page.address().is_multiple_of(PAGE_SIZE));
        let mut bytes = [0xffu8; PAGE_SIZE];
        page.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [0; PAGE_SIZE]);
    }

    #[test]
    fn every_offset_and_length_reads_back() {
        let page = Page::new().unwrap();
        let pattern: Vec<u8> = (0..PAGE_SIZE).map(|i| u8::try_from(i % 251).unwrap()).collect();
        for offset in (0..17).chain(PAGE_SIZE - 40..=PAGE_SIZE) {
            for len in (0..40).filter(|len| offset + len <= PAGE_SIZE) {
                page.write(0, &[0xee; PAGE_SIZE]).unwrap();
                page.write(offset, &pattern[offset..offset + len]).unwrap();
                let mut all = [0; PAGE_SIZE];
                page.read(0, &mut all).unwrap();
                assert_eq!(all[offset..offset + len], pattern[offset..offset + len]);
                assert!(all[..offset].iter().chain(&all[offset + len..]).all(|&byte| byte == 0xee));
                let mut part = vec![0; len];
                page.read(offset, &mut part).unwrap();
                assert_eq!(part, pattern[offset..offset + len]);
            }
        }
    }

    #[test]
    fn words_and_bytes_are_the_same_memory() {
        let page = Page::new().unwrap();
        page.write_u64(PAGE_SIZE - 8, 0x0123_4567_89ab_cdef).unwrap();
        let mut bytes = [0; 8];
        page.read(PAGE_SIZE - 8, &mut bytes).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 0x0123_4567_89ab_cdef);
        assert_eq!(page.read_u64(PAGE_SIZE - 8).unwrap(), 0x0123_4567_89ab_cdef);
    }

    #[test]
    fn access_outside_is_refused() {
        let page = Page::new().unwrap();
        assert!(matches!(page.read(PAGE_SIZE, &mut [0]), Err(PageError::Outside { .. })));
        assert!(matches!(page.write(usize::MAX, &[0, 0]), Err(PageError::Outside { .. })));
        assert!(matches!(page.read_u64(PAGE_SIZE - 7), Err(PageError::Outside { .. })));
        assert!(matches!(page.write_u64(4, 0), Err(PageError::Unaligned { offset: 4 })));
    }

    /// The lines of smaps about the mapping that holds `address`, if any does.
    fn smaps_of(address: usize) -> Option<String> {
        let is_start = |line: &str| {
            let (start, end) = line.split_whitespace().next()?.split_once('-')?;
            let parse = |text| usize::from_str_radix(text, 16).ok();
            Some(parse(start)?..parse(end)?)
        };
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let lines: Vec<&str> = smaps
            .lines()
            .skip_while(|line| !is_start(line).is_some_and(|range| range.contains(&address)))
            .collect();
        let (first, rest) = lines.split_first()?;
        let rest = rest.iter().take_while(|line| is_start(line).is_none()).copied();
        Some(std::iter::once(*first).chain(rest).collect::<Vec<_>>().join("\n"))
    }

    #[test]
    fn drop_unmaps() {
        // Another thread of the test may take the address again at once: then try once more.
        let unmapped = (0..100).any(|_| {
            let page = Page::new().unwrap();
            let address = page.address();
            assert!(smaps_of(address).is_some());
            drop(page);
            smaps_of(address).is_none()
        });
        assert!(unmapped);
    }

    #[test]
    fn many_pages_need_few_mappings() {
        let count = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
        let before = count();
        let pages: Vec<Page> = (0..2000).map(|_| Page::new().unwrap()).collect();
        // vm.max_map_count must not bound how many pages a tool can map. Other threads of the test
        // map things as well.
        assert!(count() < before + 500, "{} mappings for {} pages", count() - before, pages.len());
    }

    #[test]
    fn leak_does_not_unmap() {
        let page = Page::new().unwrap();
        let address = page.address();
        page.leak();
        assert!(smaps_of(address).is_some());
    }

    #[test]
    fn fork_and_core_dump_pass_the_page_by() {
        let page = Page::new().unwrap();
        let smaps = smaps_of(page.address()).unwrap();
        let flags = smaps.lines().find(|line| line.starts_with("VmFlags:")).unwrap();
        assert!(flags.contains(" wf") && flags.contains(" dd"), "{flags}");
    }
}

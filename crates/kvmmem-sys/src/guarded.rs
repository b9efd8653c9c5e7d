// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guarded accesses to foreign memory, which may be removed at any moment and raises SIGBUS then,
//! or SIGILL.
//!
//! Only the routines of `copies.s` access it. A routine that is interrupted by the signal ends
//! early and reports how far it got.
//!
//! The handler of SIGBUS recognises such a fault by three conditions: the instruction is in one of
//! two code ranges (loads from foreign memory, stores to it), the kernel raised the signal for a
//! page fault, and the address is the one that the routine was accessing. SIGILL is raised in a
//! virtual machine for an access to a PCI device's memory after the device was unplugged: KVM
//! emulates the access then, and does not know the instruction. It names the instruction alone,
//! which must be in one of the two ranges. Any other signal goes to the handler that was installed
//! before, or to the default action.
//!
//! The handler is installed once, at the first mapping. A handler that the program installs later
//! must pass on signals that are not its own, as this one does; otherwise a removed page kills the
//! process again. A forked process inherits the handler; `exec` removes it together with all
//! mappings.

mod signal;

use std::arch::{global_asm, is_x86_feature_detected};

pub(crate) use signal::prepare;

/// Bytes that one turn of the block routines moves.
pub(crate) const BLOCK: usize = 64;

/// From this length on, string instructions are faster than the block routines, where the processor
/// has them fast.
const STRING_MIN: usize = 512;

/// From this length on, memory is in no cache, and loads with hints are faster than either.
pub(crate) const STREAM_MIN: usize = 64 << 10;

/// Bytes that one turn of the routine with hints moves.
const STREAM_BLOCK: usize = 128;

/// Bytes that write-combining memory is read by.
const LINE: usize = 64;

global_asm!(include_str!("guarded/copies.s"), options(raw));

type Copy = unsafe extern "sysv64" fn(*mut u8, *const u8, usize) -> usize;
type Load = unsafe extern "sysv64" fn(*const u8) -> LoadResult;
type Store = unsafe extern "sysv64" fn(*mut u8, u64) -> usize;
type Find = unsafe extern "sysv64" fn(*const Vectors, *const u8, usize, usize, usize) -> LoadResult;

/// A result in rax and rdx.
#[doc(hidden)]
#[repr(C)]
#[derive(Debug)]
pub struct LoadResult {
    left: usize,
    word: u64,
}

unsafe extern "sysv64" {
    fn kvmmem_guarded_load_blocks(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn kvmmem_guarded_load_stream_avx2(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn kvmmem_guarded_load_write_combining_sse41(to: *mut u8, from: *const u8, len: usize)
    -> usize;
    fn kvmmem_guarded_load_bytes(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn kvmmem_guarded_load_1(from: *const u8) -> LoadResult;
    fn kvmmem_guarded_load_2(from: *const u8) -> LoadResult;
    fn kvmmem_guarded_load_4(from: *const u8) -> LoadResult;
    fn kvmmem_guarded_load_8(from: *const u8) -> LoadResult;
    fn kvmmem_guarded_find_avx2(
        vectors: *const Vectors,
        from: *const u8,
        len: usize,
        second: usize,
        third: usize,
    ) -> LoadResult;
    fn kvmmem_guarded_find_sse2(
        vectors: *const Vectors,
        from: *const u8,
        len: usize,
        second: usize,
        third: usize,
    ) -> LoadResult;
    fn kvmmem_guarded_find_any_avx2(
        groups: *const Groups,
        from: *const u8,
        len: usize,
    ) -> LoadResult;
    fn kvmmem_guarded_sweep_avx2(from: *const u8, len: usize) -> LoadResult;
    fn kvmmem_guarded_store_blocks(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn kvmmem_guarded_store_bytes(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn kvmmem_guarded_store_1(to: *mut u8, word: u64) -> usize;
    fn kvmmem_guarded_store_2(to: *mut u8, word: u64) -> usize;
    fn kvmmem_guarded_store_4(to: *mut u8, word: u64) -> usize;
    fn kvmmem_guarded_store_8(to: *mut u8, word: u64) -> usize;
}

/// Copies `len` bytes from foreign memory; returns how many at the end were not copied because they
/// have vanished.
///
/// # Safety
/// `from` to `from + len` lies within a mapping that stays in place during the call (what it maps
/// may change) and that may be read or raises SIGBUS; `to` to `to + len` is valid for writes.
/// [`prepare`] has returned on this thread.
pub(crate) unsafe fn load(to: *mut u8, from: *const u8, len: usize) -> usize {
    let mut done = 0;
    if len >= STREAM_MIN && is_x86_feature_detected!("avx2") {
        let whole = len - len % STREAM_BLOCK;
        // SAFETY: the routine loads from `from` and writes to `to` and nothing else, as far as
        // `whole`, a multiple of 128 that is at most `len`; the caller has said that both may be
        // accessed and that the thread is prepared for SIGBUS. The processor has AVX2.
        done = whole - unsafe { kvmmem_guarded_load_stream_avx2(to, from, whole) };
    }
    // SAFETY: both routines load and write as the one above; `done` is at most `len`, so that what
    // is left is a part of what the caller has said.
    unsafe {
        copy(
            kvmmem_guarded_load_blocks,
            kvmmem_guarded_load_bytes,
            to.wrapping_add(done),
            from.wrapping_add(done),
            len - done,
        )
    }
}

/// As [`load`], for memory that may be write-combining: other loads take a transaction each there.
/// The copy is neither begun before what precedes it in the program nor ended after what follows.
///
/// # Safety
/// As [`load`]; the mapping is one of whole pages.
pub(crate) unsafe fn load_write_combining(to: *mut u8, from: *const u8, len: usize) -> usize {
    if !is_x86_feature_detected!("sse4.1") {
        // SAFETY: the caller's.
        return unsafe { load(to, from, len) };
    }
    let mut done = 0;
    while done < len {
        let (rest, skipped) = (len - done, from.wrapping_add(done).addr() % LINE);
        let (to, line) = (to.wrapping_add(done), from.wrapping_add(done).wrapping_sub(skipped));
        if skipped == 0 && rest >= LINE {
            let whole = rest - rest % LINE;
            // SAFETY: the routine loads `whole` bytes from `line`, a multiple of 64, and writes as
            // many to `to`: `whole` is a multiple of 64 that is at most what the caller has said
            // of both. The processor has SSE4.1, and the thread is prepared.
            let left = unsafe { kvmmem_guarded_load_write_combining_sse41(to, line, whole) };
            if left > 0 {
                return rest - whole + left;
            }
            done += whole;
        } else {
            // Part of a line.
            let mut copy = [0u8; LINE];
            let part = rest.min(LINE - skipped);
            // SAFETY: as above, for the line that has the next byte. It lies in the mapping, which
            // is one of whole pages, and so of whole lines; `copy` has a line's length.
            let left =
                unsafe { kvmmem_guarded_load_write_combining_sse41(copy.as_mut_ptr(), line, LINE) };
            if left > 0 {
                return rest;
            }
            // SAFETY: `skipped` and `part` are a line's length at most together, `part` is at most
            // what the caller has said may be written from `to` on, and `copy` is this call's own.
            unsafe { to.copy_from_nonoverlapping(copy.as_ptr().wrapping_add(skipped), part) };
            done += part;
        }
    }
    0
}

/// Copies `len` bytes to foreign memory; returns how many at the end were not copied because their
/// place has vanished.
///
/// # Safety
/// As [`load`], with `to` and `from` the other way round; the mapping may be written or raises
/// SIGBUS.
pub(crate) unsafe fn store(to: *mut u8, from: *const u8, len: usize) -> usize {
    // SAFETY: both routines read from `from` and store to `to` and nothing else; the caller has
    // said that both may be, up to `len`, and that the thread is prepared for SIGBUS.
    unsafe { copy(kvmmem_guarded_store_blocks, kvmmem_guarded_store_bytes, to, from, len) }
}

/// # Safety
/// Both routines may be called with the pointers and any length up to `len`.
unsafe fn copy(blocks: Copy, bytes: Copy, to: *mut u8, from: *const u8, len: usize) -> usize {
    // Microcode knows best, but takes a while to begin; processors without that (and emulators) go
    // byte by byte.
    let whole =
        if len >= STRING_MIN && is_x86_feature_detected!("ermsb") { 0 } else { len - len % BLOCK };
    // SAFETY: by this function's contract.
    let done = whole - unsafe { blocks(to, from, whole) };
    if done == len {
        return 0;
    }
    // What follows a block that stopped is copied byte by byte, up to the very byte that is
    // missing. SAFETY: by this function's contract for the stretch from `from`: `done` is at
    // most `len`, so the rest is a part of it.
    unsafe { bytes(to.wrapping_add(done), from.wrapping_add(done), len - done) }
}

/// What the find routines compare with: three bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Vectors(pub(crate) [Vector; 3]);

/// A byte and the mask under which it counts, each as often as a vector has bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Vector {
    pub(crate) value: [u8; 32],
    pub(crate) mask: [u8; 32],
}

/// How far the second and the third byte are behind the first one; the third is not nearer than the
/// second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Distances {
    second: u8,
    third: u8,
}

impl Distances {
    /// `None` where the third one is nearer.
    pub(crate) fn new(second: u8, third: u8) -> Option<Self> {
        (second <= third).then_some(Self { second, third })
    }

    pub(crate) fn second(self) -> usize {
        self.second.into()
    }

    pub(crate) fn third(self) -> usize {
        self.third.into()
    }
}

/// Looks at `places`, a multiple of [`BLOCK`], in blocks, up to the first block in which one
/// matches: at which the first byte is found, and the others at their distances. Returns how many
/// places were left then, those of this block among them, and which of the block's match. Where
/// none is left, none matches; where some are left and none matches, the memory at the first of
/// these blocks has vanished.
///
/// # Safety
/// As [`load`], for `places` and the third byte's distance from `from` on.
pub(crate) unsafe fn find(
    vectors: &Vectors,
    distances: Distances,
    from: *const u8,
    places: usize,
) -> (usize, u64) {
    let find: Find = if is_x86_feature_detected!("avx2") {
        kvmmem_guarded_find_avx2
    } else {
        kvmmem_guarded_find_sse2
    };
    let (second, third) = (distances.second(), distances.third());
    // SAFETY: both routines load the 192 bytes of `vectors` and, block by block, 64 bytes at the
    // block and at both distances behind it, of which the third is the larger: all within what
    // the caller has said may be loaded. They write nothing, and the first one needs AVX2,
    // which there is.
    let LoadResult { left, word } = unsafe { find(vectors, from, places + third, second, third) };
    (left - third, word)
}

/// Which of eight groups a byte may be in, for four bytes: for each of its halves a bit a group.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Groups {
    /// For each of the bytes, by its low and by its high half. The processor looks up 16 bytes at a
    /// time, so each table is there twice.
    pub(crate) halves: [[[u8; 32]; 2]; 4],
    mask: [u8; 32],
}

impl Groups {
    pub(crate) fn new() -> Self {
        Self { halves: [[[0; 32]; 2]; 4], mask: [0x0f; 32] }
    }
}

/// Looks at `places`, a multiple of [`BLOCK`], in blocks, up to the first block in which one may
/// have the four bytes of one of the groups. Returns as [`find`] does; `None` on a processor
/// without AVX2.
///
/// # Safety
/// As [`load`], for `places` and three bytes from `from` on.
pub(crate) unsafe fn find_any(
    groups: &Groups,
    from: *const u8,
    places: usize,
) -> Option<(usize, u64)> {
    if !is_x86_feature_detected!("avx2") {
        return None;
    }
    // SAFETY: the routine loads the 288 bytes of `groups` and, block by block, 64 bytes at the
    // block and at each of the three places behind its first: all within what the caller has said
    // may be loaded. It writes nothing, and the processor has AVX2.
    let LoadResult { left, word } =
        unsafe { kvmmem_guarded_find_any_avx2(groups, from, places + 3) };
    Some((left - 3, word))
}

/// What each of the routines that the processor can run returns for [`find`].
#[cfg(test)]
pub(crate) fn find_both(
    vectors: &Vectors,
    distances: Distances,
    memory: &[u8],
) -> Vec<(usize, u64)> {
    let mut routines: Vec<Find> = vec![kvmmem_guarded_find_sse2];
    if is_x86_feature_detected!("avx2") {
        routines.push(kvmmem_guarded_find_avx2);
    }
    let run = |find: &Find| {
        let (second, third) = (distances.second(), distances.third());
        // SAFETY: as in `find`, the memory being this program's own.
        let LoadResult { left, word } =
            unsafe { find(vectors, memory.as_ptr(), memory.len(), second, third) };
        (left - third, word)
    };
    routines.iter().map(run).collect()
}

/// Loads `len` bytes, a multiple of 128, and forgets them; returns how many at the end were not
/// loaded because they have vanished, `None` on a processor without AVX2.
///
/// # Safety
/// As [`load`].
pub(crate) unsafe fn sweep(from: *const u8, len: usize) -> Option<usize> {
    // SAFETY: the routine loads from `from` on, up to `len`, and does nothing else; the processor
    // has AVX2.
    is_x86_feature_detected!("avx2").then(|| unsafe { kvmmem_guarded_sweep_avx2(from, len) }.left)
}

mod sealed {
    pub trait Sealed {}
}

/// An integer that is accessed as a whole.
pub trait Word: sealed::Sealed + Sized {
    /// Size in bytes, and alignment.
    const SIZE: usize;
    #[doc(hidden)]
    const LOAD: Load;
    #[doc(hidden)]
    const STORE: Store;
    #[doc(hidden)]
    fn widen(self) -> u64;
    #[doc(hidden)]
    fn narrow(word: u64) -> Self;
}

macro_rules! words {
    ($($word:ty: $load:ident, $store:ident;)*) => {$(
        impl sealed::Sealed for $word {}
        impl Word for $word {
            const SIZE: usize = size_of::<$word>();
            const LOAD: Load = $load;
            const STORE: Store = $store;
            fn widen(self) -> u64 {
                self.into()
            }
            #[allow(clippy::cast_possible_truncation, reason = "it was widened by the load")]
            fn narrow(word: u64) -> Self {
                word as $word
            }
        }
    )*};
}

words! {
    u8: kvmmem_guarded_load_1, kvmmem_guarded_store_1;
    u16: kvmmem_guarded_load_2, kvmmem_guarded_store_2;
    u32: kvmmem_guarded_load_4, kvmmem_guarded_store_4;
    u64: kvmmem_guarded_load_8, kvmmem_guarded_store_8;
}

/// Reads a word of foreign memory in one access; `None` where it has vanished.
///
/// # Safety
/// As [`load`], for the word's size; `from` is a multiple of it.
pub(crate) unsafe fn load_word<W: Word>(from: *const u8) -> Option<W> {
    // SAFETY: the caller's.
    let LoadResult { left, word } = unsafe { W::LOAD(from) };
    (left == 0).then(|| W::narrow(word))
}

/// Writes a word of foreign memory in one access; `None` where it has vanished.
///
/// # Safety
/// As [`store`], for the word's size; `to` is a multiple of it.
pub(crate) unsafe fn store_word<W: Word>(to: *mut u8, word: W) -> Option<()> {
    // SAFETY: the caller's.
    let left = unsafe { W::STORE(to, word.widen()) };
    (left == 0).then_some(())
}

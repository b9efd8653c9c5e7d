// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies from and to foreign memory: memory of another virtual machine, which may vanish at any moment and then
//! raises SIGBUS. Only the routines below touch it; when one of them meets the signal, it ends early and says so.
//!
//! A handler of SIGBUS tells such a fault by where it happened: the instruction lies in one of two stretches of code
//! (loads from foreign memory, stores to it), the kernel raised the signal for a page fault, and the address is one
//! that the routine was about to access. Any other SIGBUS goes to the handler that was there before, or to the
//! default action.
//!
//! The handler is installed once, at the first mapping. One that the program installs later must pass on what it does
//! not know, as this one does; else a page that vanishes kills the process again. A process that was forked has the
//! handler as well; `exec` removes it together with all mappings.

mod signal;

use std::arch::{global_asm, is_x86_feature_detected};

pub(crate) use signal::prepare;

/// Bytes that one turn of the block routines moves.
const BLOCK: usize = 64;

/// From this length on, string instructions are faster than the block routines, where the processor has them fast.
const STRING_MIN: usize = 512;

/// Defines a symbol that other objects of the program see, but not other programs.
macro_rules! symbol {
    ($name:literal) => {
        concat!(
            ".globl ",
            $name,
            "\n.hidden ",
            $name,
            "\n.type ",
            $name,
            ", @function\n.p2align 4\n",
            $name,
            ":\n"
        )
    };
}

/// Loads an aligned word of `$size` bytes from rdi into rdx.
macro_rules! load_word {
    ($name:literal, $size:literal, $instruction:literal) => {
        concat!(
            symbol!($name),
            "mov rsi, rdi\n",
            "mov ecx, ",
            $size,
            "\n",
            $instruction,
            "\n",
            "xor ecx, ecx\n",
            "jmp kvmmem_guarded_end\n",
        )
    };
}

/// Stores an aligned word of `$size` bytes, `$register`, to rdi.
macro_rules! store_word {
    ($name:literal, $size:literal, $register:literal) => {
        concat!(
            symbol!($name),
            "mov ecx, ",
            $size,
            "\n",
            "mov [rdi], ",
            $register,
            "\n",
            "xor ecx, ecx\n",
            "jmp kvmmem_guarded_end\n",
        )
    };
}

/// Copies `rdx` bytes, a multiple of 64, in blocks.
macro_rules! blocks {
    ($name:literal) => {
        concat!(
            symbol!($name),
            "mov rcx, rdx\n",
            "2: test rcx, rcx\n",
            "jz kvmmem_guarded_end\n",
            "movups xmm0, [rsi]\n",
            "movups xmm1, [rsi + 16]\n",
            "movups xmm2, [rsi + 32]\n",
            "movups xmm3, [rsi + 48]\n",
            "movups [rdi], xmm0\n",
            "movups [rdi + 16], xmm1\n",
            "movups [rdi + 32], xmm2\n",
            "movups [rdi + 48], xmm3\n",
            "add rsi, 64\n",
            "add rdi, 64\n",
            "sub rcx, 64\n",
            "jmp 2b\n",
        )
    };
}

/// Copies `rdx` bytes; a fault in the middle leaves the number of those not copied in `rcx`.
macro_rules! bytes {
    ($name:literal) => {
        concat!(symbol!($name), "mov rcx, rdx\n", "rep movsb\n", "jmp kvmmem_guarded_end\n")
    };
}

// Every routine has the foreign address in rsi where it loads and in rdi where it stores, and keeps in rcx how many bytes
// are left, which it returns. So all that the handler needs to know of an instruction is whether it is one of the loads
// or one of the stores; it goes on at the end, where rcx is returned.
global_asm!(
    ".pushsection .text.kvmmem_guarded, \"ax\", @progbits",
    symbol!("kvmmem_guarded_loads"),
    blocks!("kvmmem_guarded_load_blocks"),
    bytes!("kvmmem_guarded_load_bytes"),
    load_word!("kvmmem_guarded_load_1", "1", "movzx edx, byte ptr [rsi]"),
    load_word!("kvmmem_guarded_load_2", "2", "movzx edx, word ptr [rsi]"),
    load_word!("kvmmem_guarded_load_4", "4", "mov edx, [rsi]"),
    load_word!("kvmmem_guarded_load_8", "8", "mov rdx, [rsi]"),
    symbol!("kvmmem_guarded_stores"),
    blocks!("kvmmem_guarded_store_blocks"),
    bytes!("kvmmem_guarded_store_bytes"),
    store_word!("kvmmem_guarded_store_1", "1", "sil"),
    store_word!("kvmmem_guarded_store_2", "2", "si"),
    store_word!("kvmmem_guarded_store_4", "4", "esi"),
    store_word!("kvmmem_guarded_store_8", "8", "rsi"),
    symbol!("kvmmem_guarded_end"),
    "mov rax, rcx",
    "ret",
    ".popsection",
);

type Copy = unsafe extern "sysv64" fn(*mut u8, *const u8, usize) -> usize;
type Load = unsafe extern "sysv64" fn(*const u8) -> Loaded;
type Store = unsafe extern "sysv64" fn(*mut u8, u64) -> usize;

/// A result in rax and rdx.
#[doc(hidden)]
#[repr(C)]
#[derive(Debug)]
pub struct Loaded {
    left: usize,
    word: u64,
}

unsafe extern "sysv64" {
    fn kvmmem_guarded_loads();
    fn kvmmem_guarded_load_blocks(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn kvmmem_guarded_load_bytes(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn kvmmem_guarded_load_1(from: *const u8) -> Loaded;
    fn kvmmem_guarded_load_2(from: *const u8) -> Loaded;
    fn kvmmem_guarded_load_4(from: *const u8) -> Loaded;
    fn kvmmem_guarded_load_8(from: *const u8) -> Loaded;
    fn kvmmem_guarded_stores();
    fn kvmmem_guarded_store_blocks(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn kvmmem_guarded_store_bytes(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn kvmmem_guarded_store_1(to: *mut u8, word: u64) -> usize;
    fn kvmmem_guarded_store_2(to: *mut u8, word: u64) -> usize;
    fn kvmmem_guarded_store_4(to: *mut u8, word: u64) -> usize;
    fn kvmmem_guarded_store_8(to: *mut u8, word: u64) -> usize;
    fn kvmmem_guarded_end();
}

/// Copies `len` bytes from foreign memory; returns how many at the end were not copied because they have vanished.
///
/// # Safety
/// `from` to `from + len` lies within a mapping that stays in place during the call (what it maps may change) and that
/// may be read or raises SIGBUS; `to` to `to + len` is valid for writes. [`prepare`] has returned on this thread.
pub(crate) unsafe fn load(to: *mut u8, from: *const u8, len: usize) -> usize {
    // SAFETY: as the caller's, which says the same of both routines.
    unsafe { copy(kvmmem_guarded_load_blocks, kvmmem_guarded_load_bytes, to, from, len) }
}

/// Copies `len` bytes to foreign memory; returns how many at the end were not copied because their place has vanished.
///
/// # Safety
/// As [`load`], with `to` and `from` the other way round; the mapping may be written or raises SIGBUS.
pub(crate) unsafe fn store(to: *mut u8, from: *const u8, len: usize) -> usize {
    // SAFETY: as the caller's, which says the same of both routines.
    unsafe { copy(kvmmem_guarded_store_blocks, kvmmem_guarded_store_bytes, to, from, len) }
}

/// # Safety
/// Both routines may be called with the pointers and any length up to `len`.
unsafe fn copy(blocks: Copy, bytes: Copy, to: *mut u8, from: *const u8, len: usize) -> usize {
    // Microcode knows best, but takes a while to begin; processors without that (and emulators) go byte by byte.
    let whole = if len >= STRING_MIN && is_x86_feature_detected!("ermsb") { 0 } else { len - len % BLOCK };
    // SAFETY: by this function's contract.
    let done = whole - unsafe { blocks(to, from, whole) };
    if done == len {
        return 0;
    }
    // What follows a block that stopped is copied byte by byte, up to the very byte that is missing.
    // SAFETY: as before, with what is left of the same stretch.
    unsafe { bytes(to.wrapping_add(done), from.wrapping_add(done), len - done) }
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
    let Loaded { left, word } = unsafe { W::LOAD(from) };
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

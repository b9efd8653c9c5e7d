// SPDX-License-Identifier: GPL-2.0-only
//! Secret bytes: kept, erased, digested and compared. C header: `include/crypto/sha2.h`.

use core::ffi::c_void;
use core::ops::{Deref, DerefMut};

use kernel::prelude::*;

extern "C" {
    fn kvmmem_sha256(data: *const u8, len: usize, out: *mut u8);
    fn kvmmem_differ(a: *const c_void, b: *const c_void, len: usize) -> bool;
}

/// Bytes on the heap that are erased when dropped. If `N` is a power of two or less than half a
/// page, they do not straddle a page: a host can read them where they are.
pub(crate) struct Secret<const N: usize>(KBox<[u8; N]>);

impl<const N: usize> Secret<N> {
    pub(crate) fn zeroed() -> Result<Self> {
        Ok(Self(KBox::new([0; N], GFP_KERNEL)?))
    }
}

impl<const N: usize> Deref for Secret<N> {
    type Target = [u8; N];

    fn deref(&self) -> &[u8; N] {
        &self.0
    }
}

impl<const N: usize> DerefMut for Secret<N> {
    fn deref_mut(&mut self) -> &mut [u8; N] {
        &mut self.0
    }
}

impl<const N: usize> Drop for Secret<N> {
    fn drop(&mut self) {
        for byte in self.0.iter_mut() {
            // SAFETY: the exclusive borrow is valid for a write. Volatile, because nothing reads
            // the byte again and the compiler may leave out any other write.
            unsafe { core::ptr::write_volatile(byte, 0) };
        }
    }
}

/// The SHA-256 of `data`.
pub(crate) fn sha256(data: &[u8]) -> [u8; 32] {
    let mut digest = [0; 32];
    // SAFETY: the function reads `data`, writes a digest's 32 bytes, and keeps neither pointer.
    unsafe { kvmmem_sha256(data.as_ptr(), data.len(), digest.as_mut_ptr()) };
    digest
}

/// Whether two digests are equal, in a time that does not tell where they differ.
pub(crate) fn is_equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    // SAFETY: the function reads 32 bytes of each array, which is their length.
    !unsafe { kvmmem_differ(a.as_ptr().cast(), b.as_ptr().cast(), 32) }
}

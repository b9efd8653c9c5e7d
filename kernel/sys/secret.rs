// SPDX-License-Identifier: GPL-2.0-only
//! Secrets: kept, erased, digested and compared. C header: `include/crypto/sha2.h`.

use core::ffi::c_void;
use core::ops::{Deref, DerefMut};

use kernel::prelude::*;
use kernel::transmute::{AsBytes, FromBytes};

extern "C" {
    fn kvmmem_sha256(data: *const u8, len: usize, out: *mut u8);
    fn kvmmem_differ(a: *const c_void, b: *const c_void, len: usize) -> bool;
}

/// A structure on the heap that is erased when dropped. Up to half a page large, it does not
/// straddle pages: a host can read it where it is.
pub(crate) struct Secret<T: AsBytes + FromBytes>(KBox<T>);

impl<T: AsBytes + FromBytes> Secret<T> {
    pub(crate) fn zeroed() -> Result<Self> {
        let mut secret = KBox::<T>::new_uninit(GFP_KERNEL)?;
        // SAFETY: any bytes make a `T`, so zeros do.
        unsafe {
            secret.as_mut_ptr().write_bytes(0, 1);
            Ok(Self(secret.assume_init()))
        }
    }
}

impl<T: AsBytes + FromBytes> Deref for Secret<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: AsBytes + FromBytes> DerefMut for Secret<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: AsBytes + FromBytes> Drop for Secret<T> {
    fn drop(&mut self) {
        for byte in self.0.as_bytes_mut() {
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

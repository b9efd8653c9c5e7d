// SPDX-License-Identifier: GPL-2.0-only
//! Pages that the module maps in the calling process, as by `mmap(2)` with MAP_FIXED. C header:
//! `include/linux/mm.h`.
//!
//! The caller holds no lock of the process's memory.

use core::ffi::c_int;
use core::ptr::null_mut;

use kernel::bindings;
use kernel::fs::File;
use kernel::prelude::*;

use crate::abi::ioctl::PAGE_SIZE;

const PROT_READ_WRITE: usize = 3;
const MAP_SHARED: usize = 1;
const MAP_PRIVATE: usize = 2;
const MAP_FIXED: usize = 0x10;
const MAP_ANONYMOUS: usize = 0x20;
const MAX_ERRNO: usize = 4095;

/// Maps the page at `offset` of a file, shared and writable, at `address`.
pub(crate) fn map_page(file: &File, address: usize, offset: u64) -> Result {
    map(file.as_ptr(), address, MAP_SHARED, offset)
}

/// Maps a page of zeros, private and writable, at `address`.
pub(crate) fn map_zero_page(address: usize) -> Result {
    map(null_mut(), address, MAP_PRIVATE | MAP_ANONYMOUS, 0)
}

fn map(file: *mut bindings::file, address: usize, flags: usize, offset: u64) -> Result {
    let task = current!();
    task.mm().ok_or(EINVAL)?;
    // SAFETY: the function does what the process may do by `mmap(2)`, and checks its arguments: any
    // will do. The process has memory of its own, as was just seen, and `file` is null or open.
    let mapped = unsafe {
        bindings::vm_mmap(
            file,
            address,
            PAGE_SIZE as usize,
            PROT_READ_WRITE,
            flags | MAP_FIXED,
            offset as usize,
        )
    };
    if mapped > MAX_ERRNO.wrapping_neg() {
        return Err(Error::from_errno(mapped as c_int));
    }
    Ok(())
}

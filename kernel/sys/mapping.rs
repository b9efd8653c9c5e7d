// SPDX-License-Identifier: GPL-2.0-only
//! Address space of a device's inode: what processes have mapped of it. C header:
//! `include/linux/mm.h`.

use core::ptr::NonNull;

use kernel::bindings;
use kernel::fs::File;
use kernel::prelude::*;

/// The pages that user space has mapped of the device, by all of its open files.
///
/// # Invariants
///
/// `inode` is a counted reference to the device's inode, `mapping` the address space that its open
/// files use.
pub(crate) struct AddressSpace {
    inode: NonNull<bindings::inode>,
    mapping: NonNull<bindings::address_space>,
}

// SAFETY: reference counts and address spaces belong to no thread.
unsafe impl Send for AddressSpace {}
// SAFETY: shared access only zaps, which any thread may.
unsafe impl Sync for AddressSpace {}

impl AddressSpace {
    pub(crate) fn of(file: &File) -> Result<Self> {
        // SAFETY: an open file has a mapping, which does not change, and that has an inode, which
        // the file keeps.
        let (mapping, inode) = unsafe {
            let mapping = (*file.as_ptr()).f_mapping;
            (mapping, (*mapping).host)
        };
        let (Some(inode), Some(mapping)) = (NonNull::new(inode), NonNull::new(mapping)) else {
            return Err(EINVAL);
        };
        // SAFETY: the file holds a reference. INVARIANT: the mapping is the inode's, and lives as
        // long.
        unsafe { bindings::ihold(inode.as_ptr()) };
        Ok(Self { inode, mapping })
    }

    /// Takes all pages at these offsets from every process. The address space is shared by all
    /// files of the device: pages of other files at these offsets go too, and come back by a
    /// fault.
    pub(crate) fn zap(&self, offset: u64, len: u64) {
        let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
            return;
        };
        // A length of 0 would mean everything.
        if len > 0 {
            // SAFETY: the mapping is alive by the type's invariant; any range may be given.
            unsafe { bindings::unmap_mapping_range(self.mapping.as_ptr(), offset, len, 1) };
        }
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // SAFETY: gives back the reference of the type's invariant, where sleeping is allowed.
        unsafe { bindings::iput(self.inode.as_ptr()) };
    }
}

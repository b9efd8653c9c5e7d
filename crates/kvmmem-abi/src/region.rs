// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The region ioctls that libkvmi tries first ("v2", KVM-VMI's kernel of December 2020): open for a
//! VM, map the region around an address, `mmap` it at the offset that equals its first GPA.
//!
//! libkvmi finds out which ABI a driver has by [`MEM_UNMAP`] with argument 0: ENOTTY means v1.

use super::ioctl::{MapMemToken, iow, iowr};

/// `KVM_GUEST_MEM_OPEN`: the argument points to the target's UUID, 16 bytes.
pub const MEM_OPEN: u32 = iow(b'i', 1, 8);

/// `KVM_GUEST_MEM_MAP`: the argument points to a [`Region`].
pub const MEM_MAP: u32 = iowr(b'i', 2, 48);

/// `KVM_GUEST_MEM_UNMAP`: the argument is the region's first GPA itself.
pub const MEM_UNMAP: u32 = iow(b'i', 3, 8);

/// The argument of [`MEM_MAP`], 48 bytes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// The token that allows the mapping.
    pub token: MapMemToken,
    /// In: any guest-physical address of the target. Out: the first one of the region that holds
    /// it.
    pub gpa: u64,
    /// Out: the region's length in bytes.
    pub length: u64,
}

const _: () = {
    assert!(core::mem::size_of::<Region>() == 48);
    assert!(MEM_OPEN == 0x4008_6901);
    assert!(MEM_MAP == 0xc030_6902);
    assert!(MEM_UNMAP == 0x4008_6903);
};

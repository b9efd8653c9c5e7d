// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The v1 ioctls of `/dev/kvmmem`, as the 2019 patch "add memory map/unmap support on the guest
//! side" has them.

/// Size in bytes of a page, of both virtual machines.
pub const PAGE_SIZE: u64 = 4096;

/// The secret that names a grant (`struct kvmi_map_mem_token`): 256 bits, used once.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MapMemToken {
    /// The token as the KVMI command GET_MAP_TOKEN returned it.
    pub token: [u64; 4],
}

/// The argument of [`MEM_MAP`] (`struct kvmi_mem_map`), 48 bytes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MemMap {
    /// The token that allows the mapping.
    pub token: MapMemToken,
    /// Guest-physical address in the target; the low 12 bits must be zero.
    pub gpa: u64,
    /// Address of the page in the calling process that is replaced; page-aligned.
    pub gva: u64,
}

impl MemMap {
    /// Size in bytes of the structure.
    pub const SIZE: usize = 48;
}

/// `KVM_INTRO_MEM_MAP`: `_IOW('i', 1, struct kvmi_mem_map)`.
pub const MEM_MAP: u32 = iow(b'i', 1, 48);

/// `KVM_INTRO_MEM_UNMAP`: `_IOW('i', 2, unsigned long)`; the argument is the gva itself, not a
/// pointer to it.
pub const MEM_UNMAP: u32 = iow(b'i', 2, 8);

/// `_IO` of `<asm-generic/ioctl.h>`.
pub(crate) const fn io(kind: u8, nr: u8) -> u32 {
    ((kind as u32) << 8) | nr as u32
}

/// `_IOW` of `<asm-generic/ioctl.h>`.
pub(crate) const fn iow(kind: u8, nr: u8, size: u32) -> u32 {
    const WRITE: u32 = 1;
    (WRITE << 30) | (size << 16) | io(kind, nr)
}

/// `_IOR` of `<asm-generic/ioctl.h>`.
pub(crate) const fn ior(kind: u8, nr: u8, size: u32) -> u32 {
    const READ: u32 = 2;
    (READ << 30) | (size << 16) | io(kind, nr)
}

/// `_IOWR` of `<asm-generic/ioctl.h>`.
pub(crate) const fn iowr(kind: u8, nr: u8, size: u32) -> u32 {
    iow(kind, nr, size) | ior(kind, nr, size)
}

const _: () = {
    assert!(core::mem::size_of::<MemMap>() == MemMap::SIZE);
    assert!(MEM_MAP == 0x4030_6901);
    assert!(MEM_UNMAP == 0x4008_6902);
};

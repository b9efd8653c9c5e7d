// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ioctls of a view on `/dev/kvmmem`: attach the file with a token, then use it by `mmap`
//! (offset = target GPA), `pread`, `pwrite`, `lseek` and `poll`.
//!
//! Errors (docs/reference/abi.md has the table): ENOTCONN without a view, EKEYREVOKED once the view
//! is revoked, ESTALE once the target is gone, ENXIO where the target has no memory or the grant
//! does not reach.

use super::ioctl::{MapMemToken, io, ior, iow, iowr};

/// `KVMMEM_INFO`: what this driver and its host can do. Needs no view.
pub const INFO: u32 = ior(b'i', 0x40, 32);

/// `KVMMEM_ATTACH`: opens the file's view; the token is used. A file has one view at a time
/// (EISCONN).
pub const ATTACH: u32 = iow(b'i', 0x41, 40);

/// `KVMMEM_RANGES`: state, rights and ranges of the view. Takes the event that `poll` reports as
/// POLLPRI.
pub const RANGES: u32 = iowr(b'i', 0x42, 48);

/// `KVMMEM_DETACH`: closes the view; accesses through mappings that are left raise SIGBUS.
pub const DETACH: u32 = io(b'i', 0x43);

/// `KVMMEM_STATS`: counters of the view.
pub const STATS: u32 = ior(b'i', 0x44, 64);

/// Version of these ioctls, in [`Info::version`].
pub const VERSION: u32 = 1;

/// [`Info::features`]: views can be attached on this host.
pub const FEATURE_VIEWS: u32 = 1 << 0;

/// [`Info::features`]: mappings use pages of 2 MiB where both sides are aligned.
pub const FEATURE_HUGE_2M: u32 = 1 << 1;

/// [`Info::features`]: mappings use pages of 1 GiB where both sides are aligned.
pub const FEATURE_HUGE_1G: u32 = 1 << 2;

/// [`Info::features`]: SEEK_DATA and SEEK_HOLE know which memory the target never used or has
/// freed; without it they know the ranges only.
pub const FEATURE_SEEK: u32 = 1 << 3;

/// [`Info::features`]: libkvmi's region ioctls are offered ([`crate::region`]).
pub const FEATURE_REGIONS: u32 = 1 << 4;

// Bit 5 is reserved: drivers before version 0.2 set it.

/// [`Info::features`]: the host shows views as PCI devices. A tool opens one at the broker's guest
/// endpoint (vsock) first. The endpoint's answer has the token that ATTACH then needs.
pub const FEATURE_DEVICES: u32 = 1 << 6;

/// [`Attach::flags`]: read-only, even if the grant allows writes.
pub const ATTACH_READ_ONLY: u32 = 1 << 0;

/// [`Ranges::state`]: in use.
pub const STATE_OPEN: u32 = 1;

/// [`Ranges::state`]: the grant was revoked.
pub const STATE_REVOKED: u32 = 2;

/// [`Ranges::state`]: the target or the broker has exited.
pub const STATE_GONE: u32 = 3;

/// [`Ranges::rights`]: reading.
pub const RIGHT_READ: u32 = 1 << 0;

/// [`Ranges::rights`]: writing.
pub const RIGHT_WRITE: u32 = 1 << 1;

/// What [`INFO`] returns.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// [`VERSION`].
    pub version: u32,
    /// `FEATURE_*`.
    pub features: u32,
    /// The most ranges that a view has.
    pub max_ranges: u32,
    /// The longest time in milliseconds from a change on the host until `poll` tells of it.
    pub event_ms: u32,
    /// 0.
    pub reserved: [u32; 4],
}

/// The argument of [`ATTACH`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Attach {
    /// The token.
    pub token: MapMemToken,
    /// 0, or [`ATTACH_READ_ONLY`].
    pub flags: u32,
    /// 0.
    pub reserved: u32,
}

/// The argument of [`RANGES`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// Out: grows with each change of the view.
    pub generation: u64,
    /// Out: `STATE_*`.
    pub state: u32,
    /// Out: `RIGHT_*`.
    pub rights: u32,
    /// Out: the target's UUID, in the order in which it is printed.
    pub uuid: [u8; 16],
    /// In: how many [`Range`]s there is room for.
    pub capacity: u32,
    /// Out: how many ranges the view has; no more than `capacity` are written.
    pub count: u32,
    /// In: address of the room.
    pub ranges: u64,
}

/// Guest-physical memory of the target that the view reaches. Ranges are disjoint, aligned to
/// pages, and ascend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

/// What [`STATS`] returns: since the file was attached.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Faults that mapped 4 KiB.
    pub faults_4k: u64,
    /// Faults that mapped 2 MiB.
    pub faults_2m: u64,
    /// Faults that mapped 1 GiB.
    pub faults_1g: u64,
    /// Faults that raised SIGBUS.
    pub faults_refused: u64,
    /// Bytes read by `pread`.
    pub read_bytes: u64,
    /// Bytes written by `pwrite`.
    pub written_bytes: u64,
    /// Changes of the view that the host made.
    pub events: u64,
    /// Not a counter: the target's instance, as [`crate::descriptor::Descriptor::instance`] has
    /// it; 0 where it is not known.
    pub instance: u64,
}

const _: () = {
    assert!(core::mem::size_of::<Info>() == 32);
    assert!(core::mem::size_of::<Attach>() == 40);
    assert!(core::mem::size_of::<Ranges>() == 48);
    assert!(core::mem::size_of::<Range>() == 16);
    assert!(core::mem::size_of::<Stats>() == 64);
};

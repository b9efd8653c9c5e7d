// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptor page: the page in which the host describes a view to the guest's driver. Views opened
//! by hypercall and views shown as PCI devices use the same format.
//!
//! All numbers are little-endian. The host makes [`Descriptor::generation`] odd, changes the page,
//! and makes it even and higher. A reader copies the page, and uses the copy if the generation was
//! the same even number before and after.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | [`MAGIC`] |
//! | 8 | 4 | [`VERSION`] |
//! | 12 | 4 | size of a range, 32 |
//! | 16 | 8 | generation |
//! | 24 | 4 | state: [`crate::native::STATE_OPEN`], [`crate::native::STATE_REVOKED`], [`crate::native::STATE_GONE`] |
//! | 28 | 4 | rights: [`crate::native::RIGHT_READ`], [`crate::native::RIGHT_WRITE`] |
//! | 32 | 32 | SHA-256 of the 32 bytes of the token by which a file takes the view |
//! | 64 | 16 | UUID of the target |
//! | 80 | 8 | first GPA of window 0, a multiple of the page size; 0 where the windows are PCI devices |
//! | 88 | 8 | length of window 0 |
//! | 96 | 4 | number of ranges, at most [`MAX_RANGES`] |
//! | 100 | 4 | flags: [`FLAG_TOKENS`] |
//! | 104 | 8 | written by the driver, where the windows are PCI devices: the highest generation that it has acted upon |
//! | 112 | 4 | number of the slot: 0 but where a view has more windows than one slot holds |
//! | 116 | 4 | written by the driver as well: 0, or `COMPLAINT_*` |
//! | 120 | 8 | the target's instance: see [`Descriptor::instance`] |
//! | 128 | 32 each | ranges: target GPA (8), length (8), offset in its window (8), number of its window (4), 0 (4) |
//! | 2176 | 1792 | the [token list](crate::token_list), where a flag says so |
//!
//! # Windows that are PCI devices
//!
//! A view is one slot, or several: PCI functions of QEMU's `ivshmem-plain`, plugged in together.
//! BAR 2 of function 0 is this page, and nothing else is ever in a function 0 of ours; BAR 2 of the
//! functions 1 to [`SLOT_WINDOWS`] are windows. Window `w` is function `1 + (w - 1) % SLOT_WINDOWS`
//! of slot `(w - 1) / SLOT_WINDOWS`, so that no window is number 0. The page of each slot but the
//! first carries magic, version, the token's digest and the slot's number, and else zeroes.
//!
//! The driver writes the generation at [`SEEN_AT`] when all windows are there and it can show them,
//! and again after each change when no process reaches what the change took away. If it cannot show
//! them, it writes a complaint. A tool that uses the devices without a driver does the same, and
//! writes [`SEEN_ALL`] when it uses nothing of the view any more.

use super::ioctl::PAGE_SIZE;
use super::native::{RIGHT_READ, RIGHT_WRITE, STATE_GONE, STATE_OPEN};

/// First eight bytes of the page.
pub const MAGIC: u64 = u64::from_le_bytes(*b"KVMMEMVW");

/// Version of this layout.
pub const VERSION: u32 = 1;

/// The most ranges of a view.
pub const MAX_RANGES: usize = 64;

/// Bytes of the page that have a meaning.
pub const SIZE: usize = RANGES_AT + MAX_RANGES * RANGE_SIZE;

/// Offset of the generation.
pub const GENERATION_AT: usize = 16;

/// Offset of the flags.
pub const FLAGS_AT: usize = 100;

/// Flag: the view is shown for the tokens of its [token list](crate::token_list), and several files
/// may have it.
pub const FLAG_TOKENS: u32 = 1;

/// Offset of the generation that the driver has acted upon.
pub const SEEN_AT: usize = 104;

/// Acknowledges every generation there will be.
pub const SEEN_ALL: u64 = u64::MAX;

/// Offset of the slot's number.
pub const SLOT_AT: usize = 112;

/// Offset of the driver's complaint.
pub const COMPLAINT_AT: usize = 116;

/// Windows in a slot: a PCI slot has eight functions, and the first is the descriptor's.
pub const SLOT_WINDOWS: u32 = 7;

/// The driver's complaint: a window's BAR got no address; its bridge has too little room.
pub const COMPLAINT_NO_ADDRESS: u32 = 1;

/// The driver's complaint: a window cannot be mapped so that it is cached.
pub const COMPLAINT_NOT_CACHED: u32 = 2;

/// The driver's complaint: it does not understand the descriptor, or its windows are not those that
/// are there.
pub const COMPLAINT_INVALID: u32 = 3;

const INSTANCE_AT: usize = 120;
const RANGES_AT: usize = 128;
const RANGE_SIZE: usize = 32;

/// Guest-physical addresses end below this.
const GPA_END: u64 = 1 << 52;

/// One range of the target's memory and its place in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowRange {
    /// First target GPA.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset of the range in its window.
    pub offset: u64,
    /// Number of the window.
    pub window: u32,
}

/// The descriptor's content but for the ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Even, and higher with each change.
    pub generation: u64,
    /// `STATE_*` of [`crate::native`].
    pub state: u32,
    /// `RIGHT_*` of [`crate::native`].
    pub rights: u32,
    /// SHA-256 of the token.
    pub token_digest: [u8; 32],
    /// UUID of the target, in the order in which it is printed.
    pub uuid: [u8; 16],
    /// First GPA of window 0.
    pub window_gpa: u64,
    /// Length of window 0, bytes.
    pub window_len: u64,
    /// Number of ranges.
    pub range_count: usize,
    /// `FLAG_*`; others are ignored.
    pub flags: u32,
    /// Identifies one run of the target: the number is the same for every view, here and on the
    /// host, until the target is reset, its RAM changes or its VMM ends. 0 where the host does
    /// not say.
    pub instance: u64,
}

/// What is wrong with a descriptor page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DescriptorError {
    /// No descriptor is here.
    Magic,
    /// Another layout.
    Version,
    /// The host was changing the page.
    Changing,
    /// State, rights or a count out of its range.
    Header,
    /// A range is empty, unaligned, out of order, or leaves its window.
    Range,
}

fn u32_at(page: &[u8; SIZE], at: usize) -> u32 {
    let mut bytes = [0; 4];
    if let Some(found) = page.get(at..at + 4) {
        bytes.copy_from_slice(found);
    }
    u32::from_le_bytes(bytes)
}

fn u64_at(page: &[u8; SIZE], at: usize) -> u64 {
    let mut bytes = [0; 8];
    if let Some(found) = page.get(at..at + 8) {
        bytes.copy_from_slice(found);
    }
    u64::from_le_bytes(bytes)
}

fn put(page: &mut [u8; SIZE], at: usize, bytes: &[u8]) {
    if let Some(place) = page.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

impl Descriptor {
    /// Reads a copy of the page and puts its ranges into `ranges`. `windows` tells the length of
    /// each window but the first, whose place the page itself gives.
    ///
    /// # Errors
    /// [`DescriptorError`]; nothing in the page is believed before it is checked.
    pub fn read(
        page: &[u8; SIZE],
        ranges: &mut [WindowRange; MAX_RANGES],
        windows: impl Fn(u32) -> Option<u64>,
    ) -> Result<Self, DescriptorError> {
        if u64_at(page, 0) != MAGIC {
            return Err(DescriptorError::Magic);
        }
        if u32_at(page, 8) != VERSION || u32_at(page, 12) as usize != RANGE_SIZE {
            return Err(DescriptorError::Version);
        }
        let generation = u64_at(page, GENERATION_AT);
        if generation & 1 != 0 {
            return Err(DescriptorError::Changing);
        }
        let (state, rights) = (u32_at(page, 24), u32_at(page, 28));
        let (window_gpa, window_len) = (u64_at(page, 80), u64_at(page, 88));
        let range_count = u32_at(page, 96) as usize;
        let window_end = window_gpa.checked_add(window_len).filter(|end| *end <= GPA_END);
        if !(STATE_OPEN..=STATE_GONE).contains(&state)
            || rights & !(RIGHT_READ | RIGHT_WRITE) != 0
            || rights & RIGHT_READ == 0
            || range_count > MAX_RANGES
            || (window_gpa | window_len) & (PAGE_SIZE - 1) != 0
            || window_end.is_none()
        {
            return Err(DescriptorError::Header);
        }
        let mut end = 0;
        for (index, range) in ranges.iter_mut().enumerate().take(range_count) {
            let at = RANGES_AT + index * RANGE_SIZE;
            *range = WindowRange {
                gpa: u64_at(page, at),
                len: u64_at(page, at + 8),
                offset: u64_at(page, at + 16),
                window: u32_at(page, at + 24),
            };
            let room = match range.window {
                0 if window_gpa != 0 => Some(window_len),
                window => windows(window),
            };
            end = range.check(end, room.ok_or(DescriptorError::Range)?)?;
        }
        let mut token_digest = [0; 32];
        let mut uuid = [0; 16];
        if let (Some(digest), Some(id)) = (page.get(32..64), page.get(64..80)) {
            token_digest.copy_from_slice(digest);
            uuid.copy_from_slice(id);
        }
        Ok(Self {
            generation,
            state,
            rights,
            token_digest,
            uuid,
            window_gpa,
            window_len,
            range_count,
            flags: u32_at(page, FLAGS_AT),
            instance: u64_at(page, INSTANCE_AT),
        })
    }

    /// The page's bytes; of `ranges` the first [`MAX_RANGES`] count, and `range_count` is taken
    /// from them.
    pub fn write(&self, ranges: &[WindowRange], page: &mut [u8; SIZE]) {
        *page = [0; SIZE];
        let count = ranges.len().min(MAX_RANGES);
        put(page, 0, &MAGIC.to_le_bytes());
        put(page, 8, &VERSION.to_le_bytes());
        put(page, 12, &32u32.to_le_bytes());
        put(page, GENERATION_AT, &self.generation.to_le_bytes());
        put(page, 24, &self.state.to_le_bytes());
        put(page, 28, &self.rights.to_le_bytes());
        put(page, 32, &self.token_digest);
        put(page, 64, &self.uuid);
        put(page, 80, &self.window_gpa.to_le_bytes());
        put(page, 88, &self.window_len.to_le_bytes());
        // At most 64.
        #[allow(clippy::cast_possible_truncation)]
        put(page, 96, &(count as u32).to_le_bytes());
        put(page, FLAGS_AT, &self.flags.to_le_bytes());
        put(page, INSTANCE_AT, &self.instance.to_le_bytes());
        for (index, range) in ranges.iter().enumerate().take(count) {
            let at = RANGES_AT + index * RANGE_SIZE;
            put(page, at, &range.gpa.to_le_bytes());
            put(page, at + 8, &range.len.to_le_bytes());
            put(page, at + 16, &range.offset.to_le_bytes());
            put(page, at + 24, &range.window.to_le_bytes());
        }
    }
}

impl WindowRange {
    /// The end of the range in the target's memory, if the range is well-formed, begins at `after`
    /// or later and fits in a window of `room` bytes.
    fn check(&self, after: u64, room: u64) -> Result<u64, DescriptorError> {
        let aligned = (self.gpa | self.len | self.offset) & (PAGE_SIZE - 1) == 0;
        let end = self.gpa.checked_add(self.len).filter(|end| *end <= GPA_END);
        let fits = self.offset.checked_add(self.len).is_some_and(|end| end <= room);
        match end {
            Some(end) if aligned && fits && self.len > 0 && self.gpa >= after => Ok(end),
            _ => Err(DescriptorError::Range),
        }
    }
}

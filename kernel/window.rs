// SPDX-License-Identifier: GPL-2.0-only
//! Window: the target's ranges, mapped into this kernel for one generation of a view.
//!
//! A range is mapped in parts of 1 GiB, each when it is first used. So opening a view takes as long
//! for a large target as for a small one, even if the CPU has no pages of 1 GiB.

use kernel::prelude::*;
use kernel::sync::{Arc, SetOnce};

use crate::abi::native;
use crate::attachment::Attachment;
use crate::knobs;
use crate::slot::Bar;
use crate::snapshot::Snapshot;
use crate::stats;
use crate::sys::memory::Memory;

/// Length of a part. Parts begin at its multiples, so that a page of 1 GiB lies in one.
pub(crate) const PART: u64 = 1 << 30;

/// Where a window is in this machine's address space.
pub(crate) struct Extent {
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// What must be kept as long as it is used, where it may be unplugged.
    pub(crate) bar: Option<Arc<Bar>>,
}

/// A range, and where in this machine's address space it is shown.
struct Piece {
    range: native::Range,
    place: u64,
    // Before the BAR, so that it is unmapped when that is given up.
    parts: KVVec<SetOnce<Memory>>,
    _bar: Option<Arc<Bar>>,
}

impl Piece {
    fn new(range: native::Range, place: u64, bar: Option<Arc<Bar>>) -> Result<Self> {
        // Descriptors are checked to end below 2^52.
        let count = place
            .saturating_add(range.len)
            .div_ceil(PART)
            .saturating_sub(place / PART);
        let count = usize::try_from(count)?;
        let mut parts = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?;
        for _ in 0..count {
            parts.push(SetOnce::new(), GFP_KERNEL_ACCOUNT)?;
        }
        Ok(Self {
            range,
            place,
            parts,
            _bar: bar,
        })
    }

    fn end(&self) -> u64 {
        self.range.gpa.saturating_add(self.range.len)
    }

    /// The part that holds the range's byte `offset`: how it is mapped, if it is, and where it is.
    fn part(&self, offset: u64) -> Option<(&SetOnce<Memory>, u64, u64)> {
        let at = self.place.checked_add(offset)?;
        let index = usize::try_from((at / PART).checked_sub(self.place / PART)?).ok()?;
        let start = self.place.max(at / PART * PART);
        let end = self
            .place
            .saturating_add(self.range.len)
            .min((at / PART + 1).saturating_mul(PART));
        Some((self.parts.get(index)?, start, end.checked_sub(start)?))
    }
}

/// Ranges of the target, disjoint and ascending, write-back in the kernel.
pub(crate) struct Window(KVec<Piece>);

impl Window {
    /// The windows of a descriptor of `host`. `EIO` where they are RAM of this machine, leave what
    /// the CPU can address, or cannot be cached; `ENOMEM` where this machine has no memory for
    /// it now.
    pub(crate) fn map(host: &Attachment, snapshot: &Snapshot) -> Result<Self> {
        let lie =
            |error| stats::lie_unless_memory(error, "the window is no memory that can be mapped");
        let mut pieces = KVec::with_capacity(snapshot.ranges().len(), GFP_KERNEL_ACCOUNT)?;
        for range in snapshot.ranges() {
            let window = host.window(snapshot, range.window).ok_or(ESTALE)?;
            let place = window.start.checked_add(range.offset).ok_or(EIO)?;
            // A device may have been replaced since the snapshot was checked.
            let fits = range
                .offset
                .checked_add(range.len)
                .is_some_and(|end| end <= window.len);
            if !fits || !Memory::is_possible(window.start, window.len) {
                return Err(lie(EINVAL));
            }
            let range = native::Range {
                gpa: range.gpa,
                len: range.len,
            };
            pieces.push(Piece::new(range, place, window.bar)?, GFP_KERNEL_ACCOUNT)?;
        }
        let window = Self(pieces);
        // The beginnings at once, to learn whether they can be mapped.
        for range in window.ranges() {
            window.find(range.gpa).map_err(lie)?;
        }
        Ok(window)
    }

    fn piece_from(&self, gpa: u64) -> Option<&Piece> {
        self.0
            .get(self.0.partition_point(|piece| piece.end() <= gpa))
    }

    /// The memory that holds `gpa`, and the offset in it. `ENXIO` where no range does, else why it
    /// cannot be mapped.
    pub(crate) fn find(&self, gpa: u64) -> Result<(&Memory, u64)> {
        let piece = self.piece_from(gpa).ok_or(ENXIO)?;
        let offset = gpa.checked_sub(piece.range.gpa).ok_or(ENXIO)?;
        let (part, start, len) = piece.part(offset).ok_or(ENXIO)?;
        let memory = match part.as_ref() {
            Some(memory) => memory,
            None => {
                knobs::map_memory()?;
                Memory::map_once(part, start, len)?
            }
        };
        Ok((
            memory,
            piece
                .place
                .saturating_add(offset)
                .saturating_sub(memory.start()),
        ))
    }

    /// The first address of the window at or after `gpa`.
    pub(crate) fn first_from(&self, gpa: u64) -> Option<u64> {
        Some(gpa.max(self.piece_from(gpa)?.range.gpa))
    }

    /// Whether `gpa` is in a range.
    pub(crate) fn contains(&self, gpa: u64) -> bool {
        self.first_from(gpa) == Some(gpa)
    }

    /// The first address at or after `gpa` that is in no range.
    pub(crate) fn first_hole_from(&self, gpa: u64) -> u64 {
        let following = self
            .0
            .iter()
            .skip(self.0.partition_point(|piece| piece.end() <= gpa));
        following.fold(gpa, |at, piece| {
            if piece.range.gpa <= at {
                at.max(piece.end())
            } else {
                at
            }
        })
    }

    /// Where the last range ends.
    pub(crate) fn end(&self) -> u64 {
        self.0.last().map_or(0, Piece::end)
    }

    pub(crate) fn ranges(&self) -> impl ExactSizeIterator<Item = native::Range> + '_ {
        self.0.iter().map(|piece| piece.range)
    }
}

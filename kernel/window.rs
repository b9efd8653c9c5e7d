// SPDX-License-Identifier: GPL-2.0-only
//! The target's ranges as they are mapped into this kernel at one generation of a view.

use kernel::prelude::*;

use crate::abi::native;
use crate::attachment::Snapshot;
use crate::stats;
use crate::sys::Memory;

/// A range and its memory.
struct Piece {
    gpa: u64,
    memory: Memory,
}

impl Piece {
    fn end(&self) -> u64 {
        // Descriptors are checked to end below 2^52.
        self.gpa.saturating_add(self.memory.len())
    }
}

/// Ranges of the target, disjoint and ascending, write-back in the kernel.
pub(crate) struct Window(KVec<Piece>);

impl Window {
    /// Maps all ranges of a descriptor. `EIO` where its window is RAM of this machine, leaves what the CPU can address,
    /// or cannot be mapped write-back.
    pub(crate) fn map(snapshot: &Snapshot) -> Result<Self> {
        let (gpa, len) = (snapshot.descriptor.window_gpa, snapshot.descriptor.window_len);
        let lie = |_| {
            stats::lie("the window is no memory that can be mapped");
            EIO
        };
        let mut pieces = KVec::with_capacity(snapshot.ranges().len(), GFP_KERNEL)?;
        if !snapshot.ranges().is_empty() && !Memory::is_possible(gpa, len) {
            return Err(lie(EINVAL));
        }
        for range in snapshot.ranges() {
            let place = gpa.checked_add(range.offset).ok_or(EIO)?;
            let memory = Memory::map(place, range.len).map_err(lie)?;
            pieces.push(Piece { gpa: range.gpa, memory }, GFP_KERNEL)?;
        }
        Ok(Self(pieces))
    }

    /// The memory of the range that holds `gpa`, and the offset in it.
    pub(crate) fn find(&self, gpa: u64) -> Option<(&Memory, u64)> {
        let piece = self.0.get(self.0.partition_point(|piece| piece.end() <= gpa))?;
        Some((&piece.memory, gpa.checked_sub(piece.gpa)?))
    }

    /// The first address of the window at or after `gpa`.
    pub(crate) fn first_from(&self, gpa: u64) -> Option<u64> {
        let piece = self.0.get(self.0.partition_point(|piece| piece.end() <= gpa))?;
        Some(gpa.max(piece.gpa))
    }

    /// The first address at or after `gpa` that is in no range.
    pub(crate) fn first_hole_from(&self, gpa: u64) -> u64 {
        let following = self.0.iter().skip(self.0.partition_point(|piece| piece.end() <= gpa));
        following.fold(gpa, |at, piece| if piece.gpa <= at { at.max(piece.end()) } else { at })
    }

    /// Where the last range ends.
    pub(crate) fn end(&self) -> u64 {
        self.0.last().map_or(0, Piece::end)
    }

    pub(crate) fn ranges(&self) -> impl ExactSizeIterator<Item = native::Range> + '_ {
        self.0.iter().map(|piece| native::Range { gpa: piece.gpa, len: piece.memory.len() })
    }
}

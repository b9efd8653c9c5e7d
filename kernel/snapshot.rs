// SPDX-License-Identifier: GPL-2.0-only
//! Snapshot of a descriptor page at one generation: copied before it is read, and validated before
//! it is used. The host may change the page at any moment.

use kernel::prelude::*;

use crate::abi::descriptor::{
    Descriptor, DescriptorError, WindowRange, GENERATION_AT, MAX_RANGES, SIZE,
};
use crate::stats;
use crate::sys::memory::Memory;

/// A copy of a descriptor page, of one generation.
pub(crate) struct PageCopy(KBox<[u8; SIZE]>);

impl PageCopy {
    /// Copies the page. `EAGAIN` while the host is changing it.
    pub(crate) fn of(page: &Memory) -> Result<Self> {
        let mut copy = KBox::new([0; SIZE], GFP_KERNEL)?;
        let generation = page.read_u64(GENERATION_AT);
        for (index, word) in copy.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&page.read_u64(8 * index).to_le_bytes());
        }
        // x86 reads in the order of the program, and volatile reads stay in it.
        if page.read_u64(GENERATION_AT) != generation {
            return Err(EAGAIN);
        }
        Ok(Self(copy))
    }
}

/// A copy of a descriptor page, checked.
pub(crate) struct Snapshot {
    pub(crate) descriptor: Descriptor,
    ranges: KBox<[WindowRange; MAX_RANGES]>,
}

/// Why a copy cannot be used.
pub(crate) enum CheckError {
    Memory,
    Descriptor(DescriptorError),
}

impl CheckError {
    /// The error for a tool: `EAGAIN` while the host is changing the page, `ENOMEM`, or `EIO` for
    /// an answer that cannot be, which is counted and logged.
    pub(crate) fn report(self) -> Error {
        match self {
            Self::Memory => ENOMEM,
            Self::Descriptor(DescriptorError::Changing) => EAGAIN,
            Self::Descriptor(error) => {
                stats::lie(reason(error));
                EIO
            }
        }
    }
}

impl Snapshot {
    /// Checks a copy of a descriptor whose only window it places itself, as a hypercall's does.
    pub(crate) fn check_opened(copy: &PageCopy) -> Result<Self, CheckError> {
        Self::check(copy, |_| None)
    }

    /// Checks a copy of a descriptor whose windows are PCI devices, of the lengths that `windows`
    /// tells.
    pub(crate) fn check_plugged(
        copy: &PageCopy,
        windows: impl Fn(u32) -> Option<u64>,
    ) -> Result<Self, CheckError> {
        let snapshot = Self::check(copy, windows)?;
        if snapshot.descriptor.window_gpa != 0 {
            // It would be believed where there is memory.
            return Err(CheckError::Descriptor(DescriptorError::Header));
        }
        Ok(snapshot)
    }

    fn check(copy: &PageCopy, windows: impl Fn(u32) -> Option<u64>) -> Result<Self, CheckError> {
        let ranges = KBox::new([WindowRange::default(); MAX_RANGES], GFP_KERNEL);
        let mut ranges = ranges.map_err(|_| CheckError::Memory)?;
        let descriptor =
            Descriptor::read(&copy.0, &mut ranges, windows).map_err(CheckError::Descriptor)?;
        Ok(Self { descriptor, ranges })
    }

    pub(crate) fn ranges(&self) -> &[WindowRange] {
        self.ranges
            .get(..self.descriptor.range_count)
            .unwrap_or(&[])
    }
}

fn reason(error: DescriptorError) -> &'static str {
    match error {
        DescriptorError::Magic => "there is no descriptor where it should be",
        DescriptorError::Version => "the descriptor is of another version",
        DescriptorError::Changing => "the descriptor is changing",
        DescriptorError::Header => "the descriptor's header is not possible",
        DescriptorError::Range => "a range of the descriptor is not possible",
    }
}

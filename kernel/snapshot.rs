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
    /// Copies the page. `None` while the host is changing it.
    pub(crate) fn of(page: &Memory) -> Result<Option<Self>> {
        let mut copy = KBox::new([0; SIZE], GFP_KERNEL)?;
        let generation = page.read_u64(GENERATION_AT);
        for (index, word) in copy.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&page.read_u64(8 * index).to_le_bytes());
        }
        // x86 reads in the order of the program, and volatile reads stay in it.
        let is_stable = page.read_u64(GENERATION_AT) == generation;
        Ok(is_stable.then_some(Self(copy)))
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
    /// Counts and logs it as an answer that cannot be: `EIO`.
    pub(crate) fn lie(self) -> Error {
        match self {
            Self::Memory => ENOMEM,
            Self::Descriptor(error) => {
                stats::lie(reason(error));
                EIO
            }
        }
    }
}

impl Snapshot {
    /// Checks a copy of a descriptor whose only window it places itself, as a hypercall's does.
    /// `None` where the host was changing the page.
    pub(crate) fn check_opened(copy: &PageCopy) -> Result<Option<Self>, CheckError> {
        Self::check(copy, |_| None)
    }

    /// Checks a copy of a descriptor whose windows are PCI devices, of the lengths that `windows`
    /// tells. `None` where the host was changing the page.
    pub(crate) fn check_plugged(
        copy: &PageCopy,
        windows: impl Fn(u32) -> Option<u64>,
    ) -> Result<Option<Self>, CheckError> {
        match Self::check(copy, windows)? {
            // It would be believed where there is memory.
            Some(snapshot) if snapshot.descriptor.window_gpa != 0 => {
                Err(CheckError::Descriptor(DescriptorError::Header))
            }
            checked => Ok(checked),
        }
    }

    fn check(
        copy: &PageCopy,
        windows: impl Fn(u32) -> Option<u64>,
    ) -> Result<Option<Self>, CheckError> {
        let ranges = KBox::new([WindowRange::default(); MAX_RANGES], GFP_KERNEL);
        let mut ranges = ranges.map_err(|_| CheckError::Memory)?;
        match Descriptor::read(&copy.0, &mut ranges, windows) {
            Ok(descriptor) => Ok(Some(Self { descriptor, ranges })),
            Err(DescriptorError::Changing) => Ok(None),
            Err(error) => Err(CheckError::Descriptor(error)),
        }
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

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Head: function 0 of a slot, whose BAR is the descriptor page.
//!
//! It mirrors the driver's `kernel/snapshot.rs`: the page is copied before it is read, and checked
//! before it is used.

use std::cell::Cell;

use kvmmem_abi::descriptor::{
    COMPLAINT_AT, Descriptor, DescriptorError, GENERATION_AT, MAGIC, MAX_RANGES, SEEN_ALL, SEEN_AT,
    SIZE, SLOT_AT, VERSION, WindowRange,
};
use kvmmem_sys::foreign::ForeignError;
use rustix::io::Errno;

use super::bar::{Bar, IsAlive};
use super::function::{Function, Kind};

/// Length of a descriptor page.
pub(super) const LEN: u64 = 4096;

/// Magic to digest: what a view is, and its generation and state.
pub(super) const HEADER: usize = 64;

const DIGEST_AT: usize = 32;

/// A descriptor page that is mapped.
#[derive(Debug)]
pub(super) struct Head(Bar);

/// What a descriptor page says at one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub(super) descriptor: Descriptor,
    pub(super) ranges: Vec<WindowRange>,
    /// The first bytes, which are others in every other generation and view.
    pub(super) header: [u8; HEADER],
}

/// Why a page says nothing that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageError {
    /// The host is changing it.
    Changing,
    /// A window that it names is not there (yet).
    Missing(u32),
    /// It says what cannot be.
    Invalid(DescriptorError),
    /// It is not there any more.
    Lost,
}

impl Head {
    pub(super) fn map(function: &Function, is_alive: IsAlive) -> Result<Self, Errno> {
        function.enable()?;
        Ok(Self(Bar::map(function, LEN, Kind::Uncached, true, is_alive)?))
    }

    /// Takes the view for this process; `false` where another one has it or had it.
    pub(super) fn claim(&self) -> Result<bool, Errno> {
        Ok(self.0.lock()? && self.0.memory().read_word(SEEN_AT as u64) != Ok(SEEN_ALL))
    }

    /// Whether it is the page of a slot of the view with this digest, and the slot's number.
    pub(super) fn slot_of(&self, digest: &[u8; 32]) -> Option<u32> {
        let mut header = [0; HEADER];
        self.0.memory().read(0, &mut header).ok()?;
        let (magic, _) = header.split_first_chunk()?;
        let version = header.get(8..12)?;
        let is_it = u64::from_le_bytes(*magic) == MAGIC
            && version == VERSION.to_le_bytes()
            && header.get(DIGEST_AT..)? == digest;
        is_it.then(|| self.0.memory().read_word(SLOT_AT as u64).ok())?
    }

    /// The header as it is at this moment.
    pub(super) fn header(&self) -> Result<[u8; HEADER], ForeignError> {
        let mut header = [0; HEADER];
        self.0.memory().read(0, &mut header)?;
        Ok(header)
    }

    /// Copies and checks the page. `windows` has the length of each window that is there.
    pub(super) fn read(&self, windows: impl Fn(u32) -> Option<u64>) -> Result<Snapshot, PageError> {
        let page = self.copy()?;
        let missing = Cell::new(None);
        let length = |number| {
            windows(number).or_else(|| {
                missing.set(Some(number));
                None
            })
        };
        let mut ranges = [WindowRange::default(); MAX_RANGES];
        let descriptor =
            Descriptor::read(&page, &mut ranges, length).map_err(|error| match error {
                DescriptorError::Changing => PageError::Changing,
                error => missing.get().map_or(PageError::Invalid(error), PageError::Missing),
            })?;
        if descriptor.window_gpa != 0 {
            return Err(PageError::Invalid(DescriptorError::Header));
        }
        let ranges = ranges.get(..descriptor.range_count).unwrap_or_default().to_vec();
        let header = page.first_chunk().copied().unwrap_or([0; HEADER]);
        Ok(Snapshot { descriptor, ranges, header })
    }

    fn copy(&self) -> Result<[u8; SIZE], PageError> {
        let generation = || {
            let word = self.0.memory().read_word::<u64>(GENERATION_AT as u64);
            word.map_err(|_| PageError::Lost)
        };
        let before = generation()?;
        let mut page = [0; SIZE];
        self.0.memory().read(0, &mut page).map_err(|_| PageError::Lost)?;
        if generation()? == before { Ok(page) } else { Err(PageError::Changing) }
    }

    /// Whether the device is there.
    pub(super) fn is_alive(&self) -> bool {
        self.0.is_alive()
    }

    /// Tells the host that nothing of a generation before this one is used any more.
    pub(super) fn acknowledge(&self, generation: u64) {
        // Where the device is gone already, the host does not hear it.
        if self.is_alive() {
            let _ = self.0.memory().write_word(SEEN_AT as u64, generation);
        }
    }

    /// Tells the host what will not do, `COMPLAINT_*`.
    pub(super) fn complain(&self, complaint: u32) {
        if self.is_alive() {
            let _ = self.0.memory().write_word(COMPLAINT_AT as u64, complaint);
        }
    }
}

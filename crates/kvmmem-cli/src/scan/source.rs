// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a scan gets at memory: in place where it is mapped, else by copies.

use anyhow::{Context, Result};
use kvmmem::PAGE_SIZE;
use kvmmem::search::{Candidates, Probe};
use kvmmem::view::{Mapping, Range, State, View, ViewError};
use kvmmem_memory::Memory;

use crate::range::GpaRange;

/// Memory that is searched.
pub(super) trait Source: Sync {
    /// Bytes in which beginnings of matches are looked for at a time: a buffer that stays in a
    /// CPU's own cache.
    const PIECE: u64 = 256 << 10;

    /// Fills `buffer` with data.
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<()>;

    /// Looks for `probe` in place, among `places` from `gpa` on, which are data with what it
    /// reaches behind them. `None` where memory is not mapped, or not any more: a copy tells
    /// why.
    fn find(&self, _probe: &Probe, _gpa: u64, _places: u64) -> Option<Option<Candidates>> {
        None
    }

    /// Called before and after memory, which is data, is gone through in place.
    fn begin(&self, _data: &GpaRange) {}
    fn end(&self, _data: &GpaRange) {}
}

impl<F: Fn(u64, &mut [u8]) -> Result<()> + Sync> Source for F {
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<()> {
        self(gpa, buffer)
    }
}

/// Memory that is copied: private RAM, a dump file, a process.
pub(super) struct Copied<'a>(pub(super) &'a dyn Memory);

impl Source for Copied<'_> {
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.read_at(gpa, buffer).context("the scan ended early")
    }
}

/// Memory of a view that is mapped.
pub(super) struct Mapped<'a> {
    view: &'a View,
    /// Ascending.
    mappings: Vec<Mapping>,
}

impl<'a> Mapped<'a> {
    /// Maps the parts, which ascend; `None` where the target's RAM is private.
    pub(super) fn new(view: &'a View, parts: &[GpaRange]) -> Result<Option<Self>> {
        let map = |part: &GpaRange| view.map(Range { gpa: part.start, len: part.end - part.start });
        match parts.iter().map(map).collect() {
            Ok(mappings) => Ok(Some(Self { view, mappings })),
            Err(ViewError::Private { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The whole pages of `data`: their mapping, and where they are in it. What is left may be
    /// memory without data, which must not be touched.
    fn pages(&self, data: &GpaRange) -> Option<(&Mapping, u64, u64)> {
        let page = PAGE_SIZE as u64;
        let (start, end) = (data.start.next_multiple_of(page), data.end / page * page);
        let mapping = self.at(start).filter(|_| start < end)?;
        Some((mapping, start - mapping.gpa(), end - start))
    }

    /// The mapping that has `gpa`.
    fn at(&self, gpa: u64) -> Option<&Mapping> {
        let after = self.mappings.partition_point(|mapping| mapping.gpa() <= gpa);
        self.mappings.get(after.checked_sub(1)?)
    }
}

impl Source for Mapped<'_> {
    /// Large enough for calls that map and unmap it, and small enough for what these touch to stay
    /// in the caches.
    const PIECE: u64 = 1 << 20;

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<()> {
        let mapping = self.at(gpa).context("memory is not mapped")?;
        mapping.read(gpa - mapping.gpa(), buffer).map_err(|error| {
            let error = anyhow::Error::new(error);
            match self.view.status().map(|status| status.state) {
                Ok(State::Revoked) => {
                    error.context("the scan ended early: the grant was taken back; get a new token")
                }
                Ok(State::Gone) => error
                    .context("the scan ended early: the target, or the host's service, is gone"),
                Ok(State::Open) => error
                    .context("the scan ended early: the target's memory was resized; scan again"),
                Err(_) => error,
            }
        })
    }

    fn find(&self, probe: &Probe, gpa: u64, places: u64) -> Option<Option<Candidates>> {
        let mapping = self.at(gpa)?;
        let found = mapping.find(probe, gpa - mapping.gpa(), places).ok()?;
        Some(found.map(|found| Candidates { at: found.at + mapping.gpa(), ..found }))
    }

    fn begin(&self, data: &GpaRange) {
        if let Some((mapping, offset, len)) = self.pages(data) {
            mapping.populate(offset, len);
        }
    }

    fn end(&self, data: &GpaRange) {
        if let Some((mapping, offset, len)) = self.pages(data) {
            mapping.release(offset, len);
        }
    }
}

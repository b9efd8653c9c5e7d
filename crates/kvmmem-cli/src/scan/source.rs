// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a scan gets at memory: in place where it is mapped, else by copies.

use anyhow::{Context, Result};
use kvmmem::PAGE_SIZE;
use kvmmem::search::{Atoms, Candidates, Probe};
use kvmmem::view::{Mapping, MappingError, Range, State, View, ViewError};
use kvmmem_memory::{DumpFile, Memory};

use crate::range::GpaRange;
use crate::unreadable::Unreadable;

/// The error where nothing that follows can be read.
const ENDED: &str = "the scan ended early";

/// Memory that is searched.
pub(super) trait Source: Sync {
    /// Bytes in which beginnings of matches are looked for at a time: a buffer that stays in a
    /// CPU's own cache.
    const PIECE: u64 = 256 << 10;

    /// Fills `buffer` with data, and with zeros where it cannot be read.
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<()>;

    /// Looks for `probe` in place, among `places` from `gpa` on. They are data, with the bytes
    /// after them that it reaches. `None` where memory is not mapped, or not any more: a copy has
    /// the reason.
    fn find(&self, _probe: &Probe, _gpa: u64, _places: u64) -> Option<Option<Candidates>> {
        None
    }

    /// Whether one of `atoms` may lie in `len` bytes of data from `gpa` on.
    fn may_hold(&self, _atoms: &Atoms, _gpa: u64, _len: u64) -> bool {
        true
    }

    /// Whether all of a range turned out to be such that it cannot be read.
    fn is_unreadable(&self, _range: &GpaRange) -> bool {
        false
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

/// Memory that is copied: private RAM, a process.
pub(super) struct CopySource<'a> {
    pub(super) memory: &'a dyn Memory,
    pub(super) unreadable: &'a Unreadable,
}

impl Source for CopySource<'_> {
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<()> {
        self.unreadable.read(self.memory, gpa, buffer).context(ENDED)
    }

    fn is_unreadable(&self, range: &GpaRange) -> bool {
        self.unreadable.covers(range)
    }
}

/// Memory of a view that is mapped.
pub(super) struct MappedSource<'a> {
    view: &'a View,
    /// Ascending.
    mappings: Vec<Mapping>,
    /// The view's, before it was mapped.
    generation: u64,
    unreadable: &'a Unreadable,
}

impl<'a> MappedSource<'a> {
    /// Maps the parts, which ascend; `None` where the target's RAM is private.
    pub(super) fn new(
        view: &'a View,
        parts: &[GpaRange],
        unreadable: &'a Unreadable,
    ) -> Result<Option<Self>> {
        let generation = view.status()?.generation;
        let map = |part: &GpaRange| view.map(Range { gpa: part.start, len: part.end - part.start });
        match parts.iter().map(map).collect() {
            Ok(mappings) => Ok(Some(Self { view, mappings, generation, unreadable })),
            Err(ViewError::Private { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The whole pages of `data`: their mapping, and where they are in it.
    fn pages(&self, data: &GpaRange) -> Option<(&Mapping, GpaRange)> {
        let mapping = self.at(data.start)?;
        let offset = data.start - mapping.gpa();
        Some((mapping, pages(offset, data)?))
    }

    /// The mapping that has `gpa`.
    fn at(&self, gpa: u64) -> Option<&Mapping> {
        let after = self.mappings.partition_point(|mapping| mapping.gpa() <= gpa);
        self.mappings.get(after.checked_sub(1)?)
    }
}

impl Source for MappedSource<'_> {
    /// Large enough for calls that map and unmap it, and small enough for what these touch to stay
    /// in the caches.
    const PIECE: u64 = 1 << 20;

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<()> {
        let mapping = self.at(gpa).context("memory is not mapped")?;
        let Err(error) = mapping.read(gpa - mapping.gpa(), buffer) else { return Ok(()) };
        let status = self.view.status();
        let (state, is_same) = match &status {
            Ok(status) => (Some(status.state), status.generation == self.generation),
            Err(_) => (None, false),
        };
        let why = match state {
            // Memory that the host has lost; a copy has the error.
            Some(State::Open) if is_same && matches!(error, MappingError::Lost { .. }) => {
                return self.unreadable.read(self.view, gpa, buffer).context(ENDED);
            }
            Some(State::Revoked) => "the grant was revoked; get a new token",
            Some(State::Gone) => "the target, or the host's service, is gone",
            Some(State::Open) => "the target's memory was resized; scan again",
            None => return Err(error.into()),
        };
        Err(error).with_context(|| format!("{ENDED}: {why}"))
    }

    fn is_unreadable(&self, range: &GpaRange) -> bool {
        self.unreadable.covers(range)
    }

    fn find(&self, probe: &Probe, gpa: u64, places: u64) -> Option<Option<Candidates>> {
        let mapping = self.at(gpa)?;
        let found = mapping.find(probe, gpa - mapping.gpa(), places).ok()?;
        Some(found.map(|found| Candidates { at: found.at + mapping.gpa(), ..found }))
    }

    fn may_hold(&self, atoms: &Atoms, gpa: u64, len: u64) -> bool {
        let mapping = self.at(gpa);
        mapping
            .is_none_or(|mapping| mapping.may_hold(atoms, gpa - mapping.gpa(), len).unwrap_or(true))
    }

    fn begin(&self, data: &GpaRange) {
        if let Some((mapping, pages)) = self.pages(data) {
            mapping.populate(pages.start, pages.end - pages.start);
        }
    }

    fn end(&self, data: &GpaRange) {
        if let Some((mapping, pages)) = self.pages(data) {
            mapping.release(pages.start, pages.end - pages.start);
        }
    }
}

/// A dump file, in place where it can be mapped.
pub(super) struct DumpSource<'a> {
    pub(super) file: &'a DumpFile,
    pub(super) unreadable: &'a Unreadable,
}

impl Source for DumpSource<'_> {
    const PIECE: u64 = MappedSource::PIECE;

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<()> {
        self.unreadable.read(self.file, gpa, buffer).context(ENDED)
    }

    fn is_unreadable(&self, range: &GpaRange) -> bool {
        self.unreadable.covers(range)
    }

    fn find(&self, probe: &Probe, gpa: u64, places: u64) -> Option<Option<Candidates>> {
        let (memory, offset) = self.file.mapped(gpa, places + probe.reach() as u64)?;
        let found = memory.find(probe, offset, places).ok()?;
        Some(found.map(|found| Candidates { at: found.at - offset + gpa, ..found }))
    }

    fn may_hold(&self, atoms: &Atoms, gpa: u64, len: u64) -> bool {
        let memory = self.file.mapped(gpa, len);
        memory.is_none_or(|(memory, offset)| memory.may_hold(atoms, offset, len).unwrap_or(true))
    }

    fn begin(&self, data: &GpaRange) {
        if let Some((memory, offset)) = self.file.mapped(data.start, data.end - data.start)
            && let Some(pages) = pages(offset, data)
        {
            // Only the speed depends on it.
            let _ = memory.populate(pages.start, pages.end - pages.start);
        }
    }

    fn end(&self, data: &GpaRange) {
        if let Some((memory, offset)) = self.file.mapped(data.start, data.end - data.start)
            && let Some(pages) = pages(offset, data)
        {
            let _ = memory.release(pages.start, pages.end - pages.start);
        }
    }
}

/// The whole pages of `data`, which is mapped at `offset`. What is left may be memory without data,
/// which must not be touched.
fn pages(offset: u64, data: &GpaRange) -> Option<GpaRange> {
    let page = PAGE_SIZE as u64;
    let pages = offset.next_multiple_of(page)..(offset + data.end - data.start) / page * page;
    (!pages.is_empty()).then_some(pages)
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a view on the host reaches: regions of the memfds of the target's RAM, and the mappings of
//! them in this process; or regions of RAM that is private to its VMM, copied by the broker.

mod data;
mod read_cache;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::Duration;

use kvmmem_proto::map::Region;

use crate::host::{Copier, CopyError, PartialCopy};
use kvmmem_sys::foreign::Foreign;
use kvmmem_sys::huge::page_size;
use kvmmem_sys::huge_write::write_at;
use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, pread};

use super::clear::clear;
use super::events::Events;
use super::vectored::{VectoredError, batch};
use super::{Event, State, ViewError, ViewOperation};
use kvmmem_memory::range::{Range, first_hole, next_range};
use read_cache::ReadCache;

/// Bytes of a page.
const PAGE: u64 = kvmmem_proto::map::PAGE_SIZE;

/// The most bytes that are copied before a thread that ends the view gets a chance.
const COPY_LIMIT: usize = 1 << 20;

/// The most bytes of a batch that the broker copies before another thread gets its channels.
const BATCH_LIMIT: usize = 8 << 20;

/// The memory that a view reaches. The methods that end or change it return when no access of this
/// process can see what was before.
#[derive(Debug)]
pub(super) struct Memory {
    /// Held while memory is copied by way of a file.
    reach: RwLock<Reach>,
    /// Locked after `reach`.
    mappings: Mutex<Vec<ReservedMapping>>,
    /// What vectored reads go through, since the first one; of the present generation. Locked
    /// after `reach`, and used with `reach` held alone.
    read_cache: Mutex<Option<Arc<ReadCache>>>,
    events: Events,
}

/// What can be reached.
#[derive(Debug)]
pub(super) struct Reach {
    pub(super) generation: u64,
    pub(super) state: State,
    /// Disjoint, in pages, ascending; none once the view has ended.
    regions: Vec<Region>,
    source: Source,
}

/// Where the memory comes from.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// From memfds, by their numbers; none once the view has ended.
    Files(Arc<[OwnedFd]>),
    /// From the broker.
    Copies(Arc<Copier>),
}

/// What a copy takes from one place.
enum Piece<'a> {
    /// From an offset of a file.
    File(&'a OwnedFd, u64),
    Copy(Arc<Copier>),
}

/// A mapping in this process, for reuse while it is in use.
#[derive(Debug)]
struct ReservedMapping {
    gpa: u64,
    memory: Weak<Foreign>,
}

impl Memory {
    pub(super) fn new(generation: u64, regions: Vec<Region>, source: Source) -> Self {
        let reach = Reach { generation, state: State::Open, regions, source };
        Self {
            reach: RwLock::new(reach),
            mappings: Mutex::default(),
            read_cache: Mutex::default(),
            events: Events::new(generation),
        }
    }

    pub(super) fn reach(&self) -> RwLockReadGuard<'_, Reach> {
        self.reach.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies as many bytes as there are in one piece from `gpa` on, and returns how many.
    pub(super) fn read(
        &self,
        operation: ViewOperation,
        gpa: u64,
        buf: &mut [u8],
    ) -> Result<usize, ViewError> {
        let reach = self.reach();
        let (piece, len) = reach.piece(operation, gpa, buf.len())?;
        let part = buf.get_mut(..len).unwrap_or_default();
        match piece {
            Piece::File(file, offset) => retried(|| pread(file, &mut *part, offset))
                .map_err(|source| ViewError::System { operation, source }),
            Piece::Copy(copier) => {
                // A copy takes the broker's time, and no end of the view is to wait for it.
                drop(reach);
                copier.read(gpa, part).map_err(|error| copy_failed(operation, gpa, error))
            }
        }
    }

    /// Fills all of `buf` from `gpa` on.
    pub(super) fn read_all(
        &self,
        operation: ViewOperation,
        mut gpa: u64,
        mut buf: &mut [u8],
    ) -> Result<(), ViewError> {
        while !buf.is_empty() {
            let count = self.read(operation, gpa, buf)?;
            gpa = gpa.saturating_add(count as u64);
            buf = buf.get_mut(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// Fills pieces in order.
    pub(super) fn read_vectored(
        &self,
        mut pieces: &mut [(u64, &mut [u8])],
    ) -> Result<(), VectoredError> {
        let mut done = 0;
        while !pieces.is_empty() {
            let limit = match self.reach().source {
                Source::Files(_) => COPY_LIMIT,
                Source::Copies(_) => BATCH_LIMIT,
            };
            let part = batch(pieces, limit);
            let count = part.len();
            self.read_batch(part)
                .map_err(|error| VectoredError { piece: done + error.piece, ..error })?;
            done += count;
            pieces = pieces.get_mut(count..).unwrap_or_default();
        }
        Ok(())
    }

    fn read_batch(&self, pieces: &mut [(u64, &mut [u8])]) -> Result<(), VectoredError> {
        let operation = |gpa, bytes: &[u8]| ViewOperation::Read { gpa, len: bytes.len() };
        let reach = self.reach();
        if let Source::Copies(copier) = &reach.source {
            let copier = Arc::clone(copier);
            // A copy takes the broker's time, and no end of the view is to wait for it.
            drop(reach);
            return copier.read_pieces(pieces).map_err(|PartialCopy { piece, bytes, error }| {
                let (gpa, operation) = match pieces.get(piece) {
                    Some((gpa, buf)) => (gpa.saturating_add(bytes as u64), operation(*gpa, buf)),
                    None => (0, ViewOperation::Read { gpa: 0, len: 0 }),
                };
                VectoredError { piece, source: copy_failed(operation, gpa, error) }
            });
        }
        let cache = self.cache(&reach);
        let period = cache.period();
        cache.look_up(period, pieces);
        for number in 0..pieces.len() {
            if let Some((gpa, _)) = pieces.get(number + 1) {
                cache.prefetch(*gpa);
            }
            let Some((gpa, buf)) = pieces.get_mut(number) else { break };
            if buf.is_empty() || cache.read(period, *gpa, buf) {
                continue;
            }
            let operation = operation(*gpa, buf);
            reach
                .read_all(operation, *gpa, buf)
                .map_err(|source| VectoredError { piece: number, source })?;
        }
        Ok(())
    }

    /// The mappings for vectored reads.
    fn cache(&self, reach: &Reach) -> Arc<ReadCache> {
        let mut cache = self.read_cache.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(cache.get_or_insert_with(|| Arc::new(ReadCache::new(reach))))
    }

    /// Unmaps what vectored reads went through. With `reach` held for writing no read uses it.
    fn clear_cache(&self) {
        *self.read_cache.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Copies as many of `bytes` as fit in one piece to `gpa` on, and returns how many.
    pub(super) fn write(
        &self,
        operation: ViewOperation,
        gpa: u64,
        bytes: &[u8],
    ) -> Result<usize, ViewError> {
        let reach = self.reach();
        let (piece, len) = reach.piece(operation, gpa, bytes.len())?;
        let part = bytes.get(..len).unwrap_or_default();
        match piece {
            Piece::File(file, offset) => retried(|| write_at(file.as_fd(), offset, part))
                .map_err(|source| ViewError::System { operation, source }),
            Piece::Copy(copier) => {
                drop(reach);
                copier.write(gpa, part).map_err(|error| copy_failed(operation, gpa, error))
            }
        }
    }

    /// The next stretch with data at `gpa` or behind.
    pub(super) fn data_from(
        &self,
        operation: ViewOperation,
        gpa: u64,
    ) -> Result<Option<Range>, ViewError> {
        let reach = self.reach();
        reach.check(operation)?;
        for region in &reach.regions {
            let Some(part) = next_range(&[range(region)], gpa) else { continue };
            let Some(file) = reach.file(region) else { return Ok(Some(part)) };
            let offset = region.offset + (part.gpa - region.gpa);
            let end = offset + part.len;
            let data = match seek(file, SeekFrom::Data(offset)) {
                Ok(data) => data.max(offset),
                // There is none up to the file's end.
                Err(Errno::NXIO) => end,
                Err(_) => return Ok(Some(part)),
            };
            if data < end {
                let hole = seek(file, SeekFrom::Hole(data)).map_or(end, |hole| hole.min(end));
                if hole > data {
                    return Ok(Some(Range { gpa: part.gpa + (data - offset), len: hole - data }));
                }
            }
        }
        Ok(None)
    }

    /// Maps `wanted`, which is made of pages.
    pub(super) fn map(
        &self,
        operation: ViewOperation,
        wanted: Range,
        is_writable: bool,
    ) -> Result<Arc<Foreign>, ViewError> {
        // Held until the mapping is in the list, so that no end of the view comes in between.
        let reach = self.reach();
        reach.check(operation)?;
        if let Source::Copies(_) = reach.source {
            return Err(ViewError::Private { operation });
        }
        if let Some(gpa) = first_hole(&reach.ranges(), wanted) {
            return Err(ViewError::Hole { operation, gpa });
        }
        let refused = |source| ViewError::System { operation, source };
        let (page, like) = reach.fit(wanted).map_err(refused)?;
        let memory =
            Arc::new(Foreign::reserve(wanted.len, like, is_writable, page).map_err(refused)?);
        reach
            .place(wanted.gpa, &memory)
            .map_err(|source| ViewError::System { operation, source })?;
        let mut mappings = self.mappings();
        mappings.retain(|mapped| mapped.memory.strong_count() > 0);
        mappings.push(ReservedMapping { gpa: wanted.gpa, memory: Arc::downgrade(&memory) });
        Ok(memory)
    }

    /// Goes over to other regions of the same files.
    pub(super) fn change(&self, generation: u64, regions: Vec<Region>) {
        let mut reach = self.reach.write().unwrap_or_else(PoisonError::into_inner);
        let is_elsewhere = reach.regions != regions;
        reach.generation = generation.max(reach.generation.saturating_add(1));
        reach.regions = regions;
        self.clear_cache();
        for mapped in self.mappings().iter().filter(|_| is_elsewhere) {
            let Some(memory) = mapped.memory.upgrade() else { continue };
            if let Err(error) = reach.place(mapped.gpa, &memory) {
                tracing::error!(%error, gpa = format_args!("{:#x}", mapped.gpa), "a mapping is lost: its memory has moved");
                clear(&memory);
            }
        }
        drop(reach);
        self.events.signal();
    }

    /// Ends the view; whether nothing of it can be accessed any more.
    pub(super) fn end(&self, state: State) -> bool {
        let mut reach = self.reach.write().unwrap_or_else(PoisonError::into_inner);
        if reach.state == State::Open {
            reach.generation = reach.generation.saturating_add(1);
            reach.state = state;
        }
        reach.regions.clear();
        reach.source = Source::Files(Arc::new([]));
        self.clear_cache();
        let mappings = std::mem::take(&mut *self.mappings());
        let lost = mappings.iter().filter_map(|mapped| mapped.memory.upgrade());
        let left = lost.filter(|memory| !clear(memory)).count();
        // Only now can anybody see that it has ended.
        drop(reach);
        self.events.signal();
        left == 0
    }

    /// Waits until something has happened that was not reported.
    pub(super) fn wait(&self, timeout: Duration) -> Option<Event> {
        self.events.wait(timeout, || {
            let reach = self.reach();
            (reach.state, reach.generation)
        })
    }

    fn mappings(&self) -> MutexGuard<'_, Vec<ReservedMapping>> {
        self.mappings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reach {
    /// The memory that can be reached.
    pub(super) fn ranges(&self) -> Vec<Range> {
        self.regions.iter().map(range).collect()
    }

    /// Whether the view is open.
    fn check(&self, operation: ViewOperation) -> Result<(), ViewError> {
        match self.state {
            State::Open => Ok(()),
            State::Revoked => Err(ViewError::Revoked { operation }),
            State::Gone => Err(ViewError::Gone { operation }),
        }
    }

    /// The file that a region lies in.
    fn file(&self, region: &Region) -> Option<&OwnedFd> {
        match &self.source {
            Source::Files(files) => files.get(usize::try_from(region.file).ok()?),
            Source::Copies(_) => None,
        }
    }

    /// What `gpa` is copied from, and how many bytes, at most `len`, at once.
    fn piece(
        &self,
        operation: ViewOperation,
        gpa: u64,
        len: usize,
    ) -> Result<(Piece<'_>, usize), ViewError> {
        self.check(operation)?;
        let region =
            self.regions.iter().find(|region| region.gpa <= gpa && gpa - region.gpa < region.len);
        let region = region.ok_or(ViewError::Hole { operation, gpa })?;
        let within = gpa - region.gpa;
        let left = usize::try_from(region.len - within).unwrap_or(usize::MAX);
        let piece = match &self.source {
            Source::Copies(copier) => Piece::Copy(Arc::clone(copier)),
            Source::Files(_) => {
                let file = self.file(region).ok_or(ViewError::Hole { operation, gpa })?;
                Piece::File(file, region.offset + within)
            }
        };
        Ok((piece, len.min(left).min(COPY_LIMIT)))
    }

    /// Copies all of `buf` out of files.
    fn read_all(
        &self,
        operation: ViewOperation,
        mut gpa: u64,
        mut buf: &mut [u8],
    ) -> Result<(), ViewError> {
        while !buf.is_empty() {
            let (piece, len) = self.piece(operation, gpa, buf.len())?;
            let Piece::File(file, offset) = piece else {
                return Err(ViewError::Hole { operation, gpa });
            };
            let part = buf.get_mut(..len).unwrap_or_default();
            let count = retried(|| pread(file, &mut *part, offset))
                .map_err(|source| ViewError::System { operation, source })?;
            gpa = gpa.saturating_add(count as u64);
            buf = buf.get_mut(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// Length of the largest pages of the files that hold `wanted`, and what its address is to be
    /// congruent to: its place in the file where that has huge pages, else its guest-physical
    /// address.
    fn fit(&self, wanted: Range) -> Result<(u64, u64), Errno> {
        let (mut largest, mut like) = (PAGE, wanted.gpa);
        for region in &self.regions {
            let Some(part) = next_range(&[range(region)], wanted.gpa) else { continue };
            if part.gpa >= wanted.gpa.saturating_add(wanted.len) {
                break;
            }
            let page = self.file(region).map_or(Ok(PAGE), |file| page_size(file.as_fd()))?;
            if page > largest {
                // Of pieces that lie otherwise, some do not fit; the others' pages would not have
                // either.
                let place = region.offset + (part.gpa - region.gpa);
                (largest, like) = (page, place.wrapping_sub(part.gpa - wanted.gpa));
            }
        }
        Ok((largest, like))
    }

    /// Makes `memory`, which stands for the addresses from `gpa` on, show what is there now; the
    /// rest of it is lost.
    fn place(&self, gpa: u64, memory: &Foreign) -> Result<(), Errno> {
        let (mut at, end) = (gpa, gpa.saturating_add(memory.len()));
        for region in &joined(&self.regions) {
            let Some(part) = next_range(&[range(region)], at).filter(|part| part.gpa < end) else {
                continue;
            };
            if part.gpa > at {
                memory.clear(at - gpa, part.gpa - at)?;
            }
            let len = part.len.min(end - part.gpa);
            let file = self.file(region).ok_or(Errno::BADF)?;
            memory.place(
                part.gpa - gpa,
                len,
                file.as_fd(),
                region.offset + (part.gpa - region.gpa),
            )?;
            at = part.gpa + len;
        }
        if at < end { memory.clear(at - gpa, end - at) } else { Ok(()) }
    }
}

/// The regions, those that continue each other as one: a huge page must not be placed in two parts.
fn joined(regions: &[Region]) -> Vec<Region> {
    let mut joined: Vec<Region> = Vec::with_capacity(regions.len());
    for region in regions {
        match joined.last_mut() {
            Some(last)
                if last.file == region.file
                    && last.gpa + last.len == region.gpa
                    && last.offset + last.len == region.offset =>
            {
                last.len += region.len;
            }
            _ => joined.push(*region),
        }
    }
    joined
}

fn range(region: &Region) -> Range {
    Range { gpa: region.gpa, len: region.len }
}

fn copy_failed(operation: ViewOperation, gpa: u64, error: CopyError) -> ViewError {
    match error {
        CopyError::Revoked => ViewError::Revoked { operation },
        CopyError::Gone => ViewError::Gone { operation },
        CopyError::Hole => ViewError::Hole { operation, gpa },
        CopyError::ReadOnly => ViewError::ReadOnly { operation },
        source => ViewError::Copy { operation, gpa, source: Box::new(source) },
    }
}

/// The number of bytes that were copied, which is positive.
fn retried(mut copy: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match copy() {
            // The file is sealed against shrinking.
            Ok(0) => return Err(Errno::IO),
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a view on the host reaches: regions of the memfds of the target's RAM, and the mappings of
//! them in this process; or regions of RAM that is private to its VMM, copied by the broker.

mod data;
mod reach;
mod read_cache;

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::Duration;

use kvmmem_memory::range::{Range, first_hole};
use kvmmem_proto::map::Region;
use kvmmem_sys::foreign::Foreign;
use kvmmem_sys::huge_write::write_at;
use rustix::io::{Errno, pread};

use super::clear::clear;
use super::error::{ViewError, ViewOperation};
use super::events::Events;
use super::status::{Event, State};
use super::vectored::{VectoredError, batch};
use crate::host::{CopyError, PartialCopy};
pub(super) use reach::Source;
use reach::{COPY_LIMIT, Piece, Reach, retried};
use read_cache::ReadCache;

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

    /// Maps `wanted`, which is made of pages.
    pub(super) fn map(
        &self,
        operation: ViewOperation,
        wanted: Range,
        is_writable: bool,
    ) -> Result<Arc<Foreign>, ViewError> {
        // Held until the mapping is in the list, so that no end of the view comes in between.
        let reach = self.reach();
        reach.state.check(operation)?;
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

    /// Changes to other regions of the same files.
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
        // Only now can another thread see that it has ended.
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

fn copy_failed(operation: ViewOperation, gpa: u64, error: CopyError) -> ViewError {
    match error {
        CopyError::Revoked => ViewError::Revoked { operation },
        CopyError::Gone => ViewError::Gone { operation },
        CopyError::Hole => ViewError::Hole { operation, gpa },
        CopyError::ReadOnly => ViewError::ReadOnly { operation },
        CopyError::Busy => ViewError::System { operation, source: Errno::AGAIN },
        source => ViewError::Copy { operation, gpa, source: Box::new(source) },
    }
}

#[cfg(test)]
mod tests;

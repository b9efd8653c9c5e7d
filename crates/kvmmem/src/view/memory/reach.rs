// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a view on the host reaches: regions of memfds, or of memory that the broker copies.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kvmmem_memory::range::{Range, next_range};
use kvmmem_proto::map::{PAGE_SIZE, Region};
use kvmmem_sys::foreign::Foreign;
use kvmmem_sys::huge::page_size;
use rustix::io::{Errno, pread};

use crate::host::Copier;
use crate::view::error::{ViewError, ViewOperation};
use crate::view::status::State;
use crate::view::vectored::fill;

/// The most bytes that are copied before a thread that ends the view gets a chance.
pub(super) const COPY_LIMIT: usize = 1 << 20;

/// What can be reached.
#[derive(Debug)]
pub(in crate::view) struct Reach {
    pub(in crate::view) generation: u64,
    pub(in crate::view) state: State,
    /// Disjoint, in pages, ascending; none once the view has ended.
    pub(super) regions: Vec<Region>,
    pub(super) source: Source,
}

/// Where the memory comes from.
#[derive(Clone, Debug)]
pub(in crate::view) enum Source {
    /// From memfds, by their numbers; none once the view has ended.
    Files(Arc<[OwnedFd]>),
    /// From the broker.
    Copies(Arc<Copier>),
}

/// What a copy takes from one place.
pub(super) enum Piece<'a> {
    /// From an offset of a file.
    File(&'a OwnedFd, u64),
    Copy(Arc<Copier>),
}

impl Reach {
    /// The memory that can be reached.
    pub(in crate::view) fn ranges(&self) -> Vec<Range> {
        self.regions.iter().map(range).collect()
    }

    /// The file that a region lies in.
    pub(super) fn file(&self, region: &Region) -> Option<&OwnedFd> {
        match &self.source {
            Source::Files(files) => files.get(usize::try_from(region.file).ok()?),
            Source::Copies(_) => None,
        }
    }

    /// What `gpa` is copied from, and how many bytes, at most `len`, at once.
    pub(super) fn piece(
        &self,
        operation: ViewOperation,
        gpa: u64,
        len: usize,
    ) -> Result<(Piece<'_>, usize), ViewError> {
        self.state.check(operation)?;
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
    pub(super) fn read_all(
        &self,
        operation: ViewOperation,
        gpa: u64,
        buf: &mut [u8],
    ) -> Result<(), ViewError> {
        fill(gpa, buf, |gpa, rest| match self.piece(operation, gpa, rest.len())? {
            (Piece::File(file, offset), len) => {
                let part = rest.get_mut(..len).unwrap_or_default();
                retried(|| pread(file, &mut *part, offset))
                    .map_err(|source| ViewError::System { operation, source })
            }
            (Piece::Copy(_), _) => Err(ViewError::Hole { operation, gpa }),
        })
    }

    /// Length of the largest pages of the files that hold `wanted`, and what its address is to be
    /// congruent to: its place in the file where that has huge pages, else its guest-physical
    /// address.
    pub(super) fn fit(&self, wanted: Range) -> Result<(u64, u64), Errno> {
        let (mut largest, mut like) = (PAGE_SIZE, wanted.gpa);
        for region in &self.regions {
            let Some(part) = next_range(&[range(region)], wanted.gpa) else { continue };
            if part.gpa >= wanted.gpa.saturating_add(wanted.len) {
                break;
            }
            let page = self.file(region).map_or(Ok(PAGE_SIZE), |file| page_size(file.as_fd()))?;
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
    pub(super) fn place(&self, gpa: u64, memory: &Foreign) -> Result<(), Errno> {
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

pub(super) fn range(region: &Region) -> Range {
    Range { gpa: region.gpa, len: region.len }
}

/// The number of bytes that were copied, which is positive.
pub(super) fn retried(mut copy: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match copy() {
            // The file is sealed against shrinking.
            Ok(0) => return Err(Errno::IO),
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

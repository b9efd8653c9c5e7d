// SPDX-License-Identifier: Apache-2.0 OR MIT
//! SEEK: finds data in a target's memory, so that a guest's scan does not make the host allocate.
//!
//! The granularity is the host's pages: a large page counts as data as soon as a byte of it does.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use kvmmem_client::vmm::Region;
use kvmmem_sys::cachestat::pages_with_contents;
use kvmmem_sys::ram::PAGE_SIZE;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::error::WindowError;
use super::windows::Windows;
use crate::introspect::source::TargetMemory;

/// What [`Windows::seek`] looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seek {
    /// For memory that the target has touched.
    Data,
    /// For memory without contents.
    Hole,
}

/// What a search for a hole looks at in one piece. `lseek` holds the lock of the target's file for
/// as long as it walks, and the target's own VMM needs that lock to take pages from its guest: so
/// it is called only where it ends soon.
const PIECE: u64 = 64 << 20;

/// After so long a search pauses.
const PATIENCE: Duration = Duration::from_millis(1);

/// How far a search came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Here is what was looked for.
    Found(u64),
    /// It is not before this target GPA.
    Until(u64),
}

impl Windows {
    /// The next target GPA, `from` or behind it, within the ranges of the view whose descriptor
    /// page is at `gpa`, that has what is looked for.
    ///
    /// # Errors
    /// [`WindowError`].
    pub(crate) fn seek(&self, gpa: u64, from: u64, seek: Seek) -> Result<Progress, WindowError> {
        let (target, regions) = {
            let mut table = self.lock();
            let index = table.descriptors.index(gpa);
            let view =
                index.and_then(|index| table.view(index)).ok_or(WindowError::NotAView { gpa })?;
            let target = view.target.clone().ok_or(WindowError::Closed { gpa })?;
            let regions: Vec<Region> = view.shown.iter().map(|shown| shown.region).collect();
            (target, regions)
        };
        let progress = search(&*target, &regions, from, seek, PIECE);
        if !matches!(progress, Ok(Progress::Until(_))) {
            let mut table = self.lock();
            let index = table.descriptors.index(gpa);
            if let Some(view) = index.and_then(|index| table.view(index)) {
                view.counters.seeks += 1;
            }
            self.count(&mut table);
        }
        progress
    }
}

/// Looks for data or holes in the files, region by region.
fn search(
    target: &dyn TargetMemory,
    regions: &[Region],
    from: u64,
    seek: Seek,
    piece: u64,
) -> Result<Progress, WindowError> {
    let deadline = Instant::now() + PATIENCE;
    for region in regions.iter().filter(|region| region.gpa + region.len > from) {
        let file = target.file(region.file).ok_or(WindowError::NotFound { from })?;
        let end = region.offset + region.len;
        let mut start = region.offset + from.saturating_sub(region.gpa);
        while seek == Seek::Hole && start < end {
            let page = start - start % PAGE_SIZE;
            let len = piece.min(end - page);
            if !is_full(file, page, len) {
                break;
            }
            start = page + len;
            if start < end && Instant::now() > deadline {
                return Ok(Progress::Until(region.gpa + (start - region.offset)));
            }
        }
        if start >= end {
            continue;
        }
        let position = match seek {
            Seek::Data => SeekFrom::Data(start),
            Seek::Hole => SeekFrom::Hole(start),
        };
        match rustix::fs::seek(file, position) {
            Ok(found) if found < end => {
                return Ok(Progress::Found(region.gpa + (found - region.offset)));
            }
            // Nothing up to the end of the file.
            Ok(_) | Err(Errno::NXIO) => {}
            Err(source) => return Err(WindowError::Search(source.into())),
        }
    }
    Err(WindowError::NotFound { from })
}

/// Whether all of a range of a file has contents; false also where the kernel cannot say.
fn is_full(file: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
    pages_with_contents(file, offset, len).is_ok_and(|pages| pages >= len.div_ceil(PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use kvmmem_proto::map::MemoryMap;
    use kvmmem_sys::ram::GuestRam;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// A target in one file, of 64 pages.
    struct Target(GuestRam, MemoryMap);

    impl TargetMemory for Target {
        fn id(&self) -> u64 {
            1
        }
        fn uuid(&self) -> [u8; 16] {
            [0; 16]
        }
        fn file(&self, index: u32) -> Option<BorrowedFd<'_>> {
            (index == 0).then(|| self.0.fd())
        }
        fn map(&self) -> &MemoryMap {
            &self.1
        }
    }

    proptest! {
        #[test]
        fn holes_and_data_are_found_piece_by_piece(
            touched in prop::collection::vec(prop::bool::weighted(0.9), 64),
            from in 0u64..70 * PAGE_SIZE,
            piece in 1u64..9,
        ) {
            let ram = GuestRam::new(64 * PAGE_SIZE).unwrap();
            for (page, _) in (0u64..).zip(&touched).filter(|(_, touched)| **touched) {
                ram.memory().write_obj(1u8, GuestAddress(page * PAGE_SIZE)).unwrap();
            }
            // Two regions with a gap in the guest's address space and none in the file.
            let regions = vec![
                Region { gpa: 0, len: 16 * PAGE_SIZE, offset: 0, file: 0 },
                Region { gpa: 20 * PAGE_SIZE, len: 48 * PAGE_SIZE, offset: 16 * PAGE_SIZE, file: 0 },
            ];
            let target = Target(ram, MemoryMap::new(regions.clone()).unwrap());
            for seek in [Seek::Data, Seek::Hole] {
                let is_it = |gpa: u64| match usize::try_from(gpa / PAGE_SIZE).unwrap() {
                    page @ 0..16 => touched[page] == (seek == Seek::Data),
                    page @ 20..68 => touched[page - 4] == (seek == Seek::Data),
                    _ => false,
                };
                let pages = (from / PAGE_SIZE + 1..68).map(|page| page * PAGE_SIZE);
                let expected = std::iter::once(from).chain(pages).find(|&gpa| is_it(gpa));
                let mut position = from;
                let found = loop {
                    match search(&target, &regions, position, seek, piece * PAGE_SIZE) {
                        Ok(Progress::Found(gpa)) => break Some(gpa),
                        Ok(Progress::Until(gpa)) => {
                            prop_assert!(gpa > position);
                            position = gpa;
                        }
                        Err(WindowError::NotFound { .. }) => break None,
                        Err(error) => panic!("{error}"),
                    }
                };
                prop_assert_eq!(found, expected, "{:?}", seek);
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a target's memory has data: so that a guest that scans it makes the host allocate nothing. The host's pages are
//! the measure: where it has given the target large ones, all of such a page is data once a byte of it is.

use kvmmem_broker::link::Region;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::error::WindowError;
use super::windows::Windows;
use crate::mapping::TargetMemory;

/// Which way [`Windows::seek`] looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seek {
    /// For memory that the target has touched.
    Data,
    /// For memory without contents.
    Hole,
}

impl Windows {
    /// The next target GPA, `from` or behind it, within the ranges of the view whose descriptor page is at `gpa`, that
    /// has what is looked for.
    ///
    /// # Errors
    /// [`WindowError`].
    pub(crate) fn seek(&self, gpa: u64, from: u64, seek: Seek) -> Result<u64, WindowError> {
        let (target, regions) = {
            let mut table = self.lock();
            let index = table.descriptors.index(gpa);
            let view = index.and_then(|index| table.view(index)).ok_or(WindowError::NotAView { gpa })?;
            let target = view.target.clone().ok_or(WindowError::Closed { gpa })?;
            view.counters.seeks += 1;
            let regions: Vec<Region> = view.shown.iter().map(|shown| shown.region).collect();
            self.count(&mut table);
            (target, regions)
        };
        search(&*target, &regions, from, seek)?.ok_or(WindowError::NotFound { from })
    }
}

/// Looks for data or holes in the files, region by region.
fn search(
    target: &dyn TargetMemory,
    regions: &[Region],
    from: u64,
    seek: Seek,
) -> Result<Option<u64>, WindowError> {
    for region in regions.iter().filter(|region| region.gpa + region.len > from) {
        let file = target.file(region.file).ok_or(WindowError::NotFound { from })?;
        let start = region.offset + from.saturating_sub(region.gpa);
        let position = match seek {
            Seek::Data => SeekFrom::Data(start),
            Seek::Hole => SeekFrom::Hole(start),
        };
        match rustix::fs::seek(file, position) {
            Ok(found) if found < region.offset + region.len => {
                return Ok(Some(region.gpa + (found - region.offset)));
            }
            // Nothing up to the end of the file.
            Ok(_) | Err(Errno::NXIO) => {}
            Err(source) => return Err(WindowError::Search(source.into())),
        }
    }
    Ok(None)
}

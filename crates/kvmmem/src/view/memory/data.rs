// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where memory has contents, told for a part of it alone: `SEEK_HOLE` goes on to the next hole,
//! however far that is, so that many threads which ask for a part each would all go through the
//! rest.

use std::os::fd::{AsFd, OwnedFd};

use kvmmem_memory::Range;
use kvmmem_memory::range::next_range;
use kvmmem_proto::map::PAGE_SIZE;
use kvmmem_sys::cachestat::pages_with_contents;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::reach::{Reach, range};
use crate::view::error::{ViewError, ViewOperation};

impl Reach {
    /// The next range with data at `gpa` or after it.
    pub(in crate::view) fn data_from(
        &self,
        operation: ViewOperation,
        gpa: u64,
    ) -> Result<Option<Range>, ViewError> {
        self.state.check(operation)?;
        for region in &self.regions {
            let Some(part) = next_range(&[range(region)], gpa) else { continue };
            let Some(file) = self.file(region) else { return Ok(Some(part)) };
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

    /// The parts of `wanted` that have contents; `None` where the system does not tell for a part.
    pub(in crate::view) fn data_in(
        &self,
        operation: ViewOperation,
        wanted: Range,
    ) -> Result<Option<Vec<Range>>, ViewError> {
        self.state.check(operation)?;
        let mut data = Vec::new();
        for region in &self.regions {
            let part =
                next_range(&[range(region)], wanted.gpa).filter(|part| part.gpa < wanted.end());
            let Some(part) = part else { continue };
            let Some(file) = self.file(region) else { return Ok(None) };
            let len = part.len.min(wanted.end() - part.gpa);
            let offset = region.offset + (part.gpa - region.gpa);
            let Some(parts) = in_file(file, offset, len) else { return Ok(None) };
            data.extend(
                parts.into_iter().map(|(at, len)| Range { gpa: part.gpa + (at - offset), len }),
            );
        }
        Ok(Some(data))
    }
}

/// Offsets and lengths of what has contents among `len` bytes from `offset` on.
fn in_file(file: &OwnedFd, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
    let end = offset.checked_add(len)?;
    let mut left = pages_with_contents(file.as_fd(), offset, len).ok()?.checked_mul(PAGE_SIZE)?;
    let (mut at, mut data) = (offset, Vec::new());
    while left > 0 && at < end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start.max(at),
            Err(Errno::NXIO) => break,
            Err(_) => return None,
        };
        if start >= end {
            break;
        }
        // All that is left has contents, or there is a hole before the end.
        let stop = match end - start {
            rest if rest <= left => end,
            _ => seek(file, SeekFrom::Hole(start)).ok()?.min(end),
        };
        // The file changes: what comes then may be left out, as if it had come later.
        data.push((start, stop - start));
        left = left.saturating_sub(stop - start);
        at = stop.max(start + 1);
    }
    Some(data)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn contents_are_told_for_a_part() {
        let file = rustix::fs::memfd_create("data", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(0x10_000).unwrap();
        for page in [0u64, 1, 4, 6, 7, 8, 9] {
            file.write_at(b"x", page * 0x1000).unwrap();
        }
        let file = OwnedFd::from(file);
        if pages_with_contents(file.as_fd(), 0, 0x1000).is_err() {
            return;
        }
        let parts = |offset: u64, len: u64| {
            let parts = in_file(&file, offset * 0x1000, len * 0x1000).unwrap();
            parts.into_iter().map(|(at, len)| (at / 0x1000, len / 0x1000)).collect::<Vec<_>>()
        };
        assert_eq!(parts(0, 16), [(0, 2), (4, 1), (6, 4)]);
        assert_eq!(parts(1, 6), [(1, 1), (4, 1), (6, 1)]);
        assert_eq!(parts(7, 2), [(7, 2)]);
        assert!(parts(2, 2).is_empty() && parts(10, 6).is_empty());
    }
}

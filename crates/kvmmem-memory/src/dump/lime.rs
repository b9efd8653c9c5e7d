// SPDX-License-Identifier: Apache-2.0 OR MIT
//! LiME files: ranges, each after a header of 32 bytes (`lime_mem_range_header` in LiME's
//! `src/lime.h`).

use std::fs::File;
use std::path::Path;

use super::error::DumpError;
use super::file::read_some;
use super::segment::{MAX_SEGMENTS, Segment};
use crate::range::Range;

/// The magic number 0x4c694d45, as it lies in the file.
pub(super) const MAGIC: [u8; 4] = *b"EMiL";

const VERSION: u32 = 1;

/// Magic and version, 4 bytes each; first address, last address, reserved, 8 bytes each.
const HEADER: usize = 32;

/// The ranges of a file of `len` bytes.
pub(super) fn segments(path: &Path, file: &File, len: u64) -> Result<Vec<Segment>, DumpError> {
    let malformed = |what| DumpError::malformed(path, what);
    let mut segments = Vec::new();
    let mut at = 0;
    while at < len {
        if segments.len() >= MAX_SEGMENTS {
            return Err(malformed("it has more than 65536 ranges"));
        }
        let mut header = [0; HEADER];
        let count =
            read_some(file, at, &mut header).map_err(|source| DumpError::read(path, at, source))?;
        let word = |at: usize| {
            u64::from_le_bytes(
                header.get(at..).and_then(|h| h.first_chunk()).copied().unwrap_or_default(),
            )
        };
        if count < HEADER || !header.starts_with(&MAGIC) || word(0) >> 32 != u64::from(VERSION) {
            return Err(malformed(
                "where a range of LiME version 1 should begin, there is something else",
            ));
        }
        let (first, last) = (word(8), word(16));
        let size = last.checked_sub(first).and_then(|size| size.checked_add(1));
        let size = size.ok_or_else(|| malformed("a range ends before it begins"))?;
        let offset = at + HEADER as u64;
        let range = Range { gpa: first, len: size };
        segments.push(Segment { range, offset });
        let needs =
            offset.checked_add(size).ok_or_else(|| malformed("a range passes the last address"))?;
        if needs > len {
            return Err(DumpError::Truncated { path: path.to_owned(), range, needs, len });
        }
        at = needs;
    }
    Ok(segments)
}

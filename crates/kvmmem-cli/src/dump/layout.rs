// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where each byte of memory goes in the dump's file.

use clap::ValueEnum;
use kvmmem::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use super::elf::{self, Load};
use super::notes::Notes;
use crate::range::GpaRange;

/// The kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Format {
    /// The offset in the file is the guest-physical address
    Raw,
    /// An ELF core file with a PT_LOAD segment for each range, the kernel's VMCOREINFO note if it
    /// has one, and the vCPUs' registers if they can be had
    Elf,
    /// A LiME file: each range after a header of 32 bytes
    Lime,
}

/// What the file begins with, and where each range lies in it.
#[derive(Debug)]
pub(super) struct Layout {
    /// First bytes of the file.
    pub(super) head: Vec<u8>,
    /// The ranges, ascending.
    segments: Vec<Segment>,
    /// Length of the file.
    pub(super) len: u64,
}

/// A range in the file.
#[derive(Debug)]
struct Segment {
    range: GpaRange,
    /// Where its memory begins.
    offset: u64,
    /// What lies directly before that.
    header: Vec<u8>,
}

impl Layout {
    /// The layout for these ranges, which ascend. `notes` are an ELF core's.
    pub(super) fn new(format: Format, ranges: &[GpaRange], notes: &Notes<'_>) -> Self {
        let notes_bytes = if format == Format::Elf { notes.bytes() } else { Vec::new() };
        let mut end = match format {
            Format::Elf => {
                elf::head_len(ranges.len(), &notes_bytes).next_multiple_of(PAGE_SIZE as u64)
            }
            Format::Raw | Format::Lime => 0,
        };
        let mut segments = Vec::with_capacity(ranges.len());
        for range in ranges {
            let header = if format == Format::Lime { lime_header(range) } else { Vec::new() };
            let offset =
                if format == Format::Raw { range.start } else { end + header.len() as u64 };
            end = offset + (range.end - range.start);
            segments.push(Segment { range: range.clone(), offset, header });
        }
        let head = match format {
            Format::Elf => {
                let load = |segment: &Segment| {
                    Load::physical(&segment.range, segment.offset, notes.direct_map)
                };
                elf::head(&segments.iter().map(load).collect::<Vec<_>>(), &notes_bytes)
            }
            Format::Raw | Format::Lime => Vec::new(),
        };
        Self { head, segments, len: end }
    }

    /// The offset in the file of the memory at `gpa`, or of the first range above it; the file's
    /// length if there is no range above.
    pub(super) fn offset(&self, gpa: u64) -> u64 {
        self.at(gpa)
            .map_or(self.len, |segment| segment.offset + gpa.saturating_sub(segment.range.start))
    }

    /// How many bytes the file has once all memory below `gpa` is in it: no header of a range that
    /// is not begun.
    pub(super) fn len_below(&self, gpa: u64) -> u64 {
        let begun = |segment: &&Segment| gpa > segment.range.start;
        match self.at(gpa) {
            Some(segment) if begun(&segment) => self.offset(gpa),
            Some(segment) => segment.offset - segment.header.len() as u64,
            None => self.len,
        }
    }

    /// The header of the range that begins at `gpa`, and its offset; `None` in the middle of a
    /// range.
    pub(super) fn header(&self, gpa: u64) -> Option<(u64, &[u8])> {
        let segment = self
            .at(gpa)
            .filter(|segment| segment.range.start == gpa && !segment.header.is_empty())?;
        Some((segment.offset - segment.header.len() as u64, &segment.header))
    }

    /// The range that `gpa` is in, or the first one above it.
    fn at(&self, gpa: u64) -> Option<&Segment> {
        let next = self.segments.partition_point(|segment| segment.range.end <= gpa);
        self.segments.get(next)
    }
}

/// `lime_mem_range_header` of version 1: magic number and version, first address, last address,
/// nothing.
fn lime_header(range: &GpaRange) -> Vec<u8> {
    const MAGIC: u32 = 0x4c69_4d45;
    const VERSION: u32 = 1;
    let words = [u64::from(VERSION) << 32 | u64::from(MAGIC), range.start, range.end - 1, 0];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_offsets_are_addresses() {
        let layout = Layout::new(Format::Raw, &[0x1000..0x3000, 0x8000..0x9000], &Notes::default());
        assert_eq!((layout.head.len(), layout.len), (0, 0x9000));
        for (gpa, offset) in
            [(0, 0x1000), (0x1000, 0x1000), (0x2001, 0x2001), (0x3000, 0x8000), (0x9000, 0x9000)]
        {
            assert_eq!(layout.offset(gpa), offset, "{gpa:#x}");
            assert_eq!((layout.len_below(gpa), layout.header(gpa)), (offset, None), "{gpa:#x}");
        }
    }

    #[test]
    fn elf_segments_follow_the_headers_in_order() {
        let ranges: Vec<GpaRange> =
            (0..80).map(|n| n * 0x10_0000..n * 0x10_0000 + 0x2000).collect();
        let layout = Layout::new(Format::Elf, &ranges, &Notes::default());
        assert_eq!(layout.head.len(), 64 + 81 * 56);
        assert_eq!(layout.offset(0), 0x2000);
        assert_eq!(layout.offset(0x10_1234), 0x5234);
        assert_eq!(layout.offset(u64::MAX), layout.len);
        assert_eq!(layout.len, 0x2000 + 80 * 0x2000);
    }

    #[test]
    fn the_note_lies_between_headers_and_segments() {
        let text = "OSRELEASE=6\n".repeat(400);
        let notes = Notes { vmcoreinfo: Some(&text), ..Notes::default() };
        let layout = Layout::new(Format::Elf, std::slice::from_ref(&(0..0x1000)), &notes);
        let notes = &layout.head[64 + 2 * 56..];
        assert_eq!(notes[..24], *b"\x0b\0\0\0\xc0\x12\0\0\0\0\0\0VMCOREINFO\0\0");
        assert_eq!(notes[24..], *text.as_bytes());
        assert_eq!(layout.offset(0), 0x2000);
    }

    #[test]
    fn lime_ranges_follow_their_headers() {
        let layout = Layout::new(
            Format::Lime,
            &[0x1000..0x3000, 0x3000..0x4000, 0x8000..0x9000],
            &Notes::default(),
        );
        assert_eq!((layout.head.len(), layout.len), (0, 3 * 32 + 0x4000));
        // Where memory is, and how far the file reaches when all below is in it.
        for (gpa, offset, below) in [
            (0, 32, 0),
            (0x1000, 32, 0),
            (0x1001, 33, 33),
            (0x3000, 0x2040, 0x2020),
            (0x5000, 0x3060, 0x3040),
            (0x8000, 0x3060, 0x3040),
            (0x9000, 0x4060, 0x4060),
        ] {
            assert_eq!((layout.offset(gpa), layout.len_below(gpa)), (offset, below), "{gpa:#x}");
        }
        let (at, header) = layout.header(0x8000).unwrap();
        assert_eq!((at, &header[..8]), (0x3040, &b"EMiL\x01\0\0\0"[..]));
        assert_eq!(header[8..24], [0x8000u64, 0x8fff].map(u64::to_le_bytes).concat());
        assert_eq!((layout.header(0x8001), layout.header(0x5000)), (None, None));
    }
}

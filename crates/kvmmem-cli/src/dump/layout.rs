// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where each byte of memory goes in the dump's file.

use clap::ValueEnum;
use kvmmem::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use crate::range::GpaRange;

/// Sizes of an ELF64 file header and of a program header.
const EHDR: u16 = 64;
const PHDR: u16 = 56;

/// The kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Format {
    /// The offset in the file is the guest-physical address
    Raw,
    /// An ELF core file with a PT_LOAD segment for each range
    Elf,
}

/// What the file begins with, and where each range lies in it.
#[derive(Debug)]
pub(super) struct Layout {
    /// First bytes of the file.
    pub(super) head: Vec<u8>,
    /// The ranges, ascending, with their offsets, ascending too.
    segments: Vec<(GpaRange, u64)>,
    /// Length of the file.
    pub(super) len: u64,
}

impl Layout {
    /// The layout for these ranges, which ascend. There are fewer than 2^16.
    pub(super) fn new(format: Format, ranges: &[GpaRange]) -> Self {
        let mut segments = Vec::with_capacity(ranges.len());
        let head_len = u64::from(EHDR) + u64::from(PHDR) * ranges.len() as u64;
        let mut end = head_len.next_multiple_of(PAGE_SIZE as u64);
        for range in ranges {
            let offset = if format == Format::Raw { range.start } else { end };
            end = offset + (range.end - range.start);
            segments.push((range.clone(), offset));
        }
        let head = if format == Format::Raw { Vec::new() } else { elf_head(&segments) };
        Self { head, segments, len: end }
    }

    /// The offset in the file of `gpa`, or of the first range above it; the file's length where there is none.
    pub(super) fn offset(&self, gpa: u64) -> u64 {
        let next = self.segments.partition_point(|(range, _)| range.end <= gpa);
        self.segments.get(next).map_or(self.len, |(range, offset)| offset + gpa.saturating_sub(range.start))
    }
}

/// The file header and the program headers of an ELF64 core file of x86-64. Addresses are physical, as in the cores
/// that VMMs write without paging: both p_vaddr and p_paddr are the GPA.
fn elf_head(segments: &[(GpaRange, u64)]) -> Vec<u8> {
    const ET_CORE: u16 = 4;
    const EM_X86_64: u16 = 62;
    const PT_LOAD: u32 = 1;
    const PF_RWX: u32 = 7;
    let count = u16::try_from(segments.len()).unwrap_or(u16::MAX - 1);
    let mut head = Vec::new();
    // 64 bits, little-endian, version 1, System V.
    head.extend(*b"\x7fELF\x02\x01\x01\x00");
    head.extend([0; 8]);
    head.extend([ET_CORE, EM_X86_64].iter().flat_map(|word| word.to_le_bytes()));
    head.extend(1u32.to_le_bytes());
    // No entry point, the program headers behind this header, no section headers.
    head.extend([0, u64::from(EHDR), 0].iter().flat_map(|word| word.to_le_bytes()));
    head.extend(0u32.to_le_bytes());
    head.extend([EHDR, PHDR, count, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()));
    for (range, offset) in segments {
        head.extend([PT_LOAD, PF_RWX].iter().flat_map(|word| word.to_le_bytes()));
        let len = range.end - range.start;
        let words = [*offset, range.start, range.start, len, len, PAGE_SIZE as u64];
        head.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    }
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_offsets_are_addresses() {
        let layout = Layout::new(Format::Raw, &[0x1000..0x3000, 0x8000..0x9000]);
        assert_eq!((layout.head.len(), layout.len), (0, 0x9000));
        for (gpa, offset) in
            [(0, 0x1000), (0x1000, 0x1000), (0x2001, 0x2001), (0x3000, 0x8000), (0x9000, 0x9000)]
        {
            assert_eq!(layout.offset(gpa), offset, "{gpa:#x}");
        }
    }

    #[test]
    fn elf_segments_follow_the_headers_in_order() {
        let ranges: Vec<GpaRange> = (0..80).map(|n| n * 0x10_0000..n * 0x10_0000 + 0x2000).collect();
        let layout = Layout::new(Format::Elf, &ranges);
        assert_eq!(layout.head.len(), 64 + 80 * 56);
        assert_eq!(layout.offset(0), 0x2000);
        assert_eq!(layout.offset(0x10_1234), 0x5234);
        assert_eq!(layout.offset(u64::MAX), layout.len);
        assert_eq!(layout.len, 0x2000 + 80 * 0x2000);
    }
}

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
    /// An ELF core file with a PT_LOAD segment for each range, and the kernel's VMCOREINFO note if it has one
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
    /// The layout for these ranges, which ascend. There are fewer than 2^16 - 2. `vmcoreinfo` is the text of that note.
    pub(super) fn new(format: Format, ranges: &[GpaRange], vmcoreinfo: Option<&str>) -> Self {
        let notes = vmcoreinfo.map(|text| note("VMCOREINFO", text.as_bytes())).unwrap_or_default();
        let notes_at = u64::from(EHDR) + u64::from(PHDR) * (ranges.len() as u64 + 1);
        let mut end = (notes_at + notes.len() as u64).next_multiple_of(PAGE_SIZE as u64);
        let mut segments = Vec::with_capacity(ranges.len());
        for range in ranges {
            let offset = if format == Format::Raw { range.start } else { end };
            end = offset + (range.end - range.start);
            segments.push((range.clone(), offset));
        }
        let head = match format {
            Format::Raw => Vec::new(),
            Format::Elf => elf_head(&segments, notes_at, &notes),
        };
        Self { head, segments, len: end }
    }

    /// The offset in the file of `gpa`, or of the first range above it; the file's length where there is none.
    pub(super) fn offset(&self, gpa: u64) -> u64 {
        let next = self.segments.partition_point(|(range, _)| range.end <= gpa);
        self.segments.get(next).map_or(self.len, |(range, offset)| offset + gpa.saturating_sub(range.start))
    }
}

/// An ELF note of type 0: header, name and content, the latter two padded to 4 bytes.
fn note(name: &str, content: &[u8]) -> Vec<u8> {
    let len = |bytes: usize| u32::try_from(bytes).unwrap_or(0).to_le_bytes();
    let mut note = [len(name.len() + 1), len(content.len()), [0; 4]].concat();
    note.extend(name.bytes().chain([0]));
    note.resize(note.len().next_multiple_of(4), 0);
    note.extend(content);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

/// The file header, the program headers and the notes of an ELF64 core file of x86-64. Addresses are physical, as in the
/// cores that VMMs write without paging: both p_vaddr and p_paddr are the GPA.
///
/// The notes come first, because crash reads them from the first program header without looking at its type; and p_align
/// of a PT_LOAD is 0, because crash takes a file with page-aligned offsets and another alignment for one of its old formats.
fn elf_head(segments: &[(GpaRange, u64)], notes_at: u64, notes: &[u8]) -> Vec<u8> {
    const ET_CORE: u16 = 4;
    const EM_X86_64: u16 = 62;
    const PT_LOAD: u32 = 1;
    const PT_NOTE: u32 = 4;
    const PF_RWX: u32 = 7;
    let count = u16::try_from(segments.len() + 1).unwrap_or(u16::MAX - 1);
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
    let mut program_header = |kind: u32, flags: u32, words: [u64; 6]| {
        head.extend([kind, flags].iter().flat_map(|word| word.to_le_bytes()));
        head.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    };
    let len = notes.len() as u64;
    program_header(PT_NOTE, 0, [notes_at, 0, 0, len, len, 0]);
    for (range, offset) in segments {
        let len = range.end - range.start;
        program_header(PT_LOAD, PF_RWX, [*offset, range.start, range.start, len, len, 0]);
    }
    head.extend(notes);
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_offsets_are_addresses() {
        let layout = Layout::new(Format::Raw, &[0x1000..0x3000, 0x8000..0x9000], None);
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
        let layout = Layout::new(Format::Elf, &ranges, None);
        assert_eq!(layout.head.len(), 64 + 81 * 56);
        assert_eq!(layout.offset(0), 0x2000);
        assert_eq!(layout.offset(0x10_1234), 0x5234);
        assert_eq!(layout.offset(u64::MAX), layout.len);
        assert_eq!(layout.len, 0x2000 + 80 * 0x2000);
    }

    #[test]
    fn the_note_lies_between_headers_and_segments() {
        let text = "OSRELEASE=6\n".repeat(400);
        let layout = Layout::new(Format::Elf, std::slice::from_ref(&(0..0x1000)), Some(&text));
        let notes = &layout.head[64 + 2 * 56..];
        assert_eq!(notes[..24], *b"\x0b\0\0\0\xc0\x12\0\0\0\0\0\0VMCOREINFO\0\0");
        assert_eq!(notes[24..], *text.as_bytes());
        assert_eq!(layout.offset(0), 0x2000);
        assert_eq!(note("AB", b"x"), *b"\x03\0\0\0\x01\0\0\0\0\0\0\0AB\0\0x\0\0\0");
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! ELF core files of x86-64 (elf(5)): the file header, the program headers and the notes, which
//! come before all memory.
//!
//! What other tools expect beyond the format: crash reads notes from the first program header
//! without looking at its type, so PT_NOTE is the first. It takes a file whose PT_LOADs have
//! page-aligned offsets and another alignment than 0 for one of its old formats, so p_align is 0.
//! Segments may not overlap in physical memory, or volatility3 finds nothing.

use crate::range::GpaRange;

/// Sizes of an ELF64 file header, of a program header and of a section header.
const EHDR: u16 = 64;
const PHDR: u16 = 56;
const SHDR: u16 = 64;

/// Stands for a number of program headers that is in the first section header.
const PN_XNUM: u16 = 0xffff;

/// All may be done with a segment of physical memory.
const PF_RWX: u32 = 7;

/// A PT_LOAD segment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Load {
    pub(super) flags: u32,
    /// Where it lies in the file, and how many bytes are there.
    pub(super) offset: u64,
    pub(super) file_len: u64,
    pub(super) virtual_address: u64,
    pub(super) physical_address: u64,
    pub(super) len: u64,
    pub(super) align: u64,
}

impl Load {
    /// Physical memory. Without a kernel's direct map the virtual address is the physical one, as
    /// in the cores that VMMs write without paging.
    pub(super) fn physical(range: &GpaRange, offset: u64, direct_map: Option<u64>) -> Self {
        let len = range.end - range.start;
        let virtual_address = range.start.wrapping_add(direct_map.unwrap_or(0));
        Self {
            flags: PF_RWX,
            offset,
            file_len: len,
            virtual_address,
            physical_address: range.start,
            len,
            align: 0,
        }
    }
}

/// Bytes before the memory of `count` segments.
pub(super) fn head_len(count: usize, notes: &[u8]) -> u64 {
    notes_at(count) + notes.len() as u64
}

/// Where the notes begin: after the headers, and the one section whose only use is a large number
/// of them.
fn notes_at(count: usize) -> u64 {
    let section = if count + 1 < usize::from(PN_XNUM) { 0 } else { u64::from(SHDR) };
    u64::from(EHDR) + u64::from(PHDR) * (count as u64 + 1) + section
}

/// What the file begins with.
pub(super) fn head(loads: &[Load], notes: &[u8]) -> Vec<u8> {
    const ET_CORE: u16 = 4;
    const EM_X86_64: u16 = 62;
    const PT_LOAD: u32 = 1;
    const PT_NOTE: u32 = 4;
    let count = loads.len() + 1;
    let few = u16::try_from(count).ok().filter(|count| *count < PN_XNUM);
    let sections_at = u64::from(EHDR) + u64::from(PHDR) * count as u64;
    let mut head = Vec::new();
    // 64 bits, little-endian, version 1, System V.
    head.extend(*b"\x7fELF\x02\x01\x01\x00");
    head.extend([0; 8]);
    head.extend([ET_CORE, EM_X86_64].iter().flat_map(|word| word.to_le_bytes()));
    head.extend(1u32.to_le_bytes());
    // No entry point; the program headers follow this header, then the section headers if there is
    // one.
    let sections = if few.is_some() { 0 } else { sections_at };
    head.extend([0, u64::from(EHDR), sections].iter().flat_map(|word| word.to_le_bytes()));
    head.extend(0u32.to_le_bytes());
    let numbers = match few {
        Some(count) => [EHDR, PHDR, count, 0, 0, 0],
        None => [EHDR, PHDR, PN_XNUM, SHDR, 1, 0],
    };
    head.extend(numbers.iter().flat_map(|word| word.to_le_bytes()));
    let mut program_header = |kind: u32, flags: u32, words: [u64; 6]| {
        head.extend([kind, flags].iter().flat_map(|word| word.to_le_bytes()));
        head.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    };
    let len = notes.len() as u64;
    program_header(PT_NOTE, 0, [notes_at(loads.len()), 0, 0, len, len, 0]);
    for Load { flags, offset, file_len, virtual_address, physical_address, len, align } in loads {
        let words = [*offset, *virtual_address, *physical_address, *file_len, *len, *align];
        program_header(PT_LOAD, *flags, words);
    }
    if few.is_none() {
        // sh_info of the first section.
        let mut section = [0; SHDR as usize];
        let count = u32::try_from(count).unwrap_or(0).to_le_bytes();
        section.iter_mut().skip(44).zip(count).for_each(|(to, from)| *to = from);
        head.extend(section);
    }
    head.extend(notes);
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn a_large_number_of_segments_is_in_a_section() {
        for count in [0xfffd, 0xfffe, 0x1_2345] {
            let head = head(&vec![Load::default(); count], b"note");
            assert_eq!(head.len() as u64, head_len(count, b"note"));
            let short = |at: usize| usize::from(u16::from_le_bytes([head[at], head[at + 1]]));
            if count == 0xfffd {
                assert_eq!((short(56), word(&head, 40), short(60)), (count + 1, 0, 0));
                continue;
            }
            assert_eq!((short(56), short(58), short(60)), (0xffff, 64, 1));
            let section = usize::try_from(word(&head, 40)).unwrap();
            assert_eq!(word(&head, section + 40) >> 32, count as u64 + 1);
            assert_eq!(word(&head, 64 + 8), section as u64 + 64);
        }
    }
}

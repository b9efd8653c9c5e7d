// SPDX-License-Identifier: Apache-2.0 OR MIT
//! ELF core files: the PT_LOAD segments of x86-64, by their physical addresses, as `kvmmem dump`,
//! QEMU's `dump-guest-memory`, `virsh dump --memory-only` and kdump write them (elf(5)).

use std::fs::File;
use std::path::Path;

use object::LittleEndian as Le;
use object::elf::{
    ELFCLASS64, ELFDATA2LSB, EM_X86_64, ET_CORE, FileHeader64, PN_XNUM, PT_LOAD, PT_NOTE,
    ProgramHeader64, SectionHeader64,
};
use object::pod::{Pod, from_bytes};

use super::error::DumpError;
use super::file::read_some;
use super::notes;
use super::segment::{MAX_SEGMENTS, Segment};
use crate::paging::ControlRegisters;
use crate::range::Range;

/// Bytes of a program header.
const PHDR: u64 = size_of::<ProgramHeader64<Le>>() as u64;

/// The segments of the core in a file of `len` bytes.
pub(super) fn segments(path: &Path, file: &File, len: u64) -> Result<Vec<Segment>, DumpError> {
    let mut segments = Vec::new();
    for program in programs(path, file, len)? {
        // What memory has beyond the file's bytes was left out of the dump.
        let size = program.p_filesz.get(Le).min(program.p_memsz.get(Le));
        if program.p_type.get(Le) == PT_LOAD && size > 0 {
            let range = Range { gpa: program.p_paddr.get(Le), len: size };
            segments.push(Segment { range, offset: program.p_offset.get(Le) });
        }
    }
    // Linux, gcore and `kvmmem dump --pid` write no physical addresses. A machine has its page 0
    // more than once only where other segments tell what else there is.
    if segments.len() > 1 && segments.iter().all(|segment| segment.range.gpa == 0) {
        let what = "it is the core of a process, not of a machine: open it with gdb";
        return Err(DumpError::malformed(path, what));
    }
    Ok(segments)
}

/// The control registers of the vCPUs, in their order; empty where the core has none.
pub(super) fn vcpus(
    path: &Path,
    file: &File,
    len: u64,
) -> Result<Vec<ControlRegisters>, DumpError> {
    let programs = programs(path, file, len)?;
    match programs.iter().find(|program| program.p_type.get(Le) == PT_NOTE) {
        Some(program) => {
            notes::vcpus(path, file, program.p_offset.get(Le), program.p_filesz.get(Le))
        }
        None => Ok(Vec::new()),
    }
}

/// The program headers of the core in a file of `len` bytes.
fn programs(path: &Path, file: &File, len: u64) -> Result<Vec<ProgramHeader64<Le>>, DumpError> {
    let malformed = |what| DumpError::malformed(path, what);
    let header: FileHeader64<Le> = read(path, file, 0)?;
    if (header.e_ident.class, header.e_ident.data) != (ELFCLASS64, ELFDATA2LSB) {
        return Err(malformed("it is not an ELF file of 64 bits, little-endian"));
    }
    if header.e_type.get(Le) != ET_CORE || header.e_machine.get(Le) != EM_X86_64 {
        return Err(malformed("it is an ELF file, and not a core of x86-64"));
    }
    if u64::from(header.e_phentsize.get(Le)) != PHDR {
        return Err(malformed("its program headers have another size than those of ELF64"));
    }
    let count = count(path, file, &header)?;
    let mut programs = Vec::new();
    for index in 0..count {
        let at = header.e_phoff.get(Le).checked_add(index * PHDR).filter(|at| *at < len);
        let at = at.ok_or_else(|| malformed("its program headers lie outside the file"))?;
        programs.push(read(path, file, at)?);
    }
    Ok(programs)
}

/// How many program headers there are: where the header has no room for the number, the first
/// section says it.
fn count(path: &Path, file: &File, header: &FileHeader64<Le>) -> Result<u64, DumpError> {
    let mut count = u64::from(header.e_phnum.get(Le));
    if count == u64::from(PN_XNUM) {
        let section: SectionHeader64<Le> = read(path, file, header.e_shoff.get(Le))?;
        count = u64::from(section.sh_info.get(Le));
    }
    if count > MAX_SEGMENTS as u64 {
        return Err(DumpError::malformed(path, "it has more than 65536 program headers"));
    }
    Ok(count)
}

/// Reads a structure.
fn read<T: Pod>(path: &Path, file: &File, offset: u64) -> Result<T, DumpError> {
    let mut bytes = vec![0; size_of::<T>()];
    let read = read_some(file, offset, &mut bytes);
    let count = read.map_err(|source| DumpError::read(path, offset, source))?;
    let bytes = bytes.get(..count).unwrap_or_default();
    from_bytes::<T>(bytes)
        .map(|(value, _)| *value)
        .map_err(|()| DumpError::malformed(path, "it ends within its headers"))
}

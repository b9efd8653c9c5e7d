// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control registers of each vCPU, from the `QEMU` notes of an ELF core (`QEMUCPUState` of
//! target/i386/arch_dump.c), as `kvmmem dump`, QEMU's `dump-guest-memory` and `virsh dump
//! --memory-only` write them. Cores of kdump have none.

use std::fs::File;
use std::path::Path;

use object::LittleEndian as Le;
use object::elf::FileHeader64;
use object::read::elf::NoteIterator;

use super::error::DumpError;
use super::file::read_some;
use crate::paging::ControlRegisters;

/// The most bytes of notes that are read: of some ten thousand vCPUs.
const MAX_LEN: u64 = 8 << 20;

/// Where CR0, CR3 and CR4 are in version 1 of the structure, and its length.
const CR0: usize = 392;
const CR3: usize = 416;
const CR4: usize = 424;
const LEN: usize = 440;

/// The registers in the notes that are `len` bytes from `offset` on, in the order of the vCPUs.
pub(super) fn vcpus(
    path: &Path,
    file: &File,
    offset: u64,
    len: u64,
) -> Result<Vec<ControlRegisters>, DumpError> {
    let malformed = || DumpError::malformed(path, "its notes make no sense");
    let len = usize::try_from(len.min(MAX_LEN)).map_err(|_| malformed())?;
    let mut bytes = vec![0; len];
    let count = read_some(file, offset, &mut bytes)
        .map_err(|source| DumpError::read(path, offset, source))?;
    let bytes = bytes.get(..count).unwrap_or_default();
    let notes = NoteIterator::<FileHeader64<Le>>::new(Le, 4, bytes).map_err(|_| malformed())?;
    let mut vcpus = Vec::new();
    for note in notes {
        let note = note.map_err(|_| malformed())?;
        if note.name() == b"QEMU" {
            vcpus.push(registers(note.desc()).ok_or_else(malformed)?);
        }
    }
    Ok(vcpus)
}

fn registers(state: &[u8]) -> Option<ControlRegisters> {
    let word = |at: usize| Some(u64::from_le_bytes(*state.get(at..)?.first_chunk()?));
    // Version and size.
    let is_known = word(0)? == (LEN as u64) << 32 | 1 && state.len() >= LEN;
    is_known.then_some(ControlRegisters {
        cr0: word(CR0)?,
        cr3: word(CR3)?,
        cr4: word(CR4)?,
        efer: None,
    })
}

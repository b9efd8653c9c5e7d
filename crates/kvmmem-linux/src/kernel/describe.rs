// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The VMCOREINFO note of a kernel that has none or a damaged one, made from its symbols and its
//! image. Offsets that only the types have are left to the readers of types.

use std::fmt::Write;

use kvmmem_memory::paging::Levels;

use crate::bytes::Bytes;
use crate::space::Space;
use crate::symbols::Symbols;
use crate::vmcoreinfo::{KERNEL_MAP, Note};

/// Where an image is that was not moved (`__START_KERNEL` with the usual CONFIG_PHYSICAL_START).
const NOT_MOVED: u64 = KERNEL_MAP + (16 << 20);

/// Bytes of each name of `struct new_utsname`, and where the release is in it.
const UTS_LEN: u64 = 65;
const RELEASE_AT: u64 = 2 * UTS_LEN;

/// Bytes of `struct uts_namespace` that hold its names: a reference counter may come before them.
const NAMES_WITHIN: u64 = 64;

/// The most bytes of the image's notes.
const MAX_NOTES: u64 = 4096;

/// Type of the note that has the build id (`NT_GNU_BUILD_ID`), its name, and the longest id.
const BUILD_ID: u32 = 3;
const GNU: &[u8; 4] = b"GNU\0";
const MAX_ID: u64 = 64;

/// The note of the kernel whose outermost table is at `table` in this space: its own, if that is
/// whole, or one with the lines that can be computed. `None` where the kernel's name is not in its
/// place.
pub(super) fn note(space: &Space<'_>, symbols: &Symbols, table: u64) -> Option<Note> {
    if let Some(note) = own_note(space, symbols) {
        return Some(note);
    }
    let names = symbols.get("init_uts_ns")?;
    let at = (0..NAMES_WITHIN).step_by(4).find(|at| {
        let mut name = [0; 6];
        space.read(names.wrapping_add(*at), &mut name).is_ok() && name == *b"Linux\0"
    })?;
    let mut release = Bytes::zeroed(UTS_LEN);
    space.read(names.wrapping_add(at + RELEASE_AT), release.as_mut()).ok()?;
    let release = release.string(0, UTS_LEN);
    if release.is_empty() || !release.bytes().all(|byte| byte.is_ascii_graphic()) {
        return None;
    }
    let root = space.root();
    let phys_base = root.cr3.wrapping_sub(table.wrapping_sub(KERNEL_MAP)).cast_signed();
    let five = u8::from(root.levels == Levels::Five);
    let mut text = format!(
        "OSRELEASE={release}\nSYMBOL(init_uts_ns)={names:x}\nOFFSET(uts_namespace.name)={at}\n\
         SYMBOL(swapper_pg_dir)={table:x}\nNUMBER(phys_base)={phys_base}\nNUMBER(pgtable_l5_enabled)={five}\n"
    );
    // A string takes what is written to it.
    for name in ["_stext", "prb"] {
        let _ = symbols.get(name).map(|gva| writeln!(text, "SYMBOL({name})={gva:x}"));
    }
    let offset = symbols.get("_text").map(|gva| gva.wrapping_sub(NOT_MOVED));
    let _ = offset.map(|offset| writeln!(text, "KERNELOFFSET={offset:x}"));
    let _ = build_id(space, symbols).map(|id| writeln!(text, "BUILD-ID={id}"));
    Some(Note { gpa: None, text })
}

/// The kernel's note, by the pointer that it has to it.
fn own_note(space: &Space<'_>, symbols: &Symbols) -> Option<Note> {
    let mut pointer = [0; 8];
    space.read(symbols.get("vmcoreinfo_note")?, &mut pointer).ok()?;
    let gpa = space.translate(u64::from_le_bytes(pointer)).ok()?.gpa;
    let read = |gpa: u64, buf: &mut [u8]| space.memory().read_at(gpa, buf);
    let note = Note::read(gpa, read).filter(|note| note.check(read).is_ok())?;
    note.address_space().is_some_and(|root| root == space.root()).then_some(note)
}

/// What the linker called the image, in hexadecimal digits.
fn build_id(space: &Space<'_>, symbols: &Symbols) -> Option<String> {
    let start = symbols.get("__start_notes")?;
    let len = symbols.get("__stop_notes")?.checked_sub(start).filter(|len| *len <= MAX_NOTES)?;
    let mut notes = Bytes::zeroed(len);
    space.read(start, notes.as_mut()).ok()?;
    let mut at = 0;
    while at < len {
        let (name_len, id_len) = (u64::from(notes.u32(at)), u64::from(notes.u32(at + 4)));
        let id_at = at + 12 + name_len.next_multiple_of(4);
        let name = notes.part(at + 12, GNU.len() as u64)?;
        if notes.u32(at + 8) == BUILD_ID && name_len == GNU.len() as u64 && name.as_ref() == GNU {
            let id = notes.part(id_at, id_len).filter(|id| (1..=MAX_ID).contains(&id.len()))?;
            return Some(id.as_ref().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        at = id_at + id_len.next_multiple_of(4);
    }
    None
}

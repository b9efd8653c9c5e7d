// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Address spaces whose tables change, mark pages as encrypted, or have pages that may not be
//! accessed.

mod common;

use common::{Guest, PAGE_TABLES, Place, RAM};
use kvmmem_linux::Space;
use kvmmem_memory::PAGE_SIZE;
use kvmmem_memory::paging::{AddressSpace, Levels, WalkError};

const TABLES: u64 = 0x10_0000;
const PTE: u64 = TABLES + 0x3000;

/// Tables whose last one, at `PTE`, is for the first 2 MiB.
fn guest(encryption: u64) -> Guest {
    let guest = Guest::default();
    for table in 0..3 {
        guest.put_word(TABLES + table * 0x1000, (TABLES + (table + 1) * 0x1000) | encryption | 7);
    }
    guest
}

fn space(guest: &Guest, encryption: u64) -> Space<'_> {
    Space::new(guest, AddressSpace { cr3: TABLES, levels: Levels::Four }, encryption)
}

#[test]
fn pages_that_lie_apart_are_one_read() {
    let guest = guest(0);
    // Two neighbours, one apart, one before, and one that is not mapped.
    for (page, frame) in [0x20_0000, 0x20_1000, 0x50_0000, 0x4f_f000].into_iter().enumerate() {
        guest.put_word(PTE + 8 * page as u64, frame | 7);
        guest.put(frame, &[b'a' + u8::try_from(page).unwrap(); PAGE_SIZE]);
    }
    let space = space(&guest, 0);
    let mut bytes = vec![0; 3 * PAGE_SIZE];
    space.read(0x800, &mut bytes).unwrap();
    let runs: Vec<(u8, usize)> =
        bytes.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect();
    assert_eq!(runs, [(b'a', 0x800), (b'b', PAGE_SIZE), (b'c', PAGE_SIZE), (b'd', 0x800)]);
    // What comes before the first address that cannot be read is there.
    let error = space.read(0x3800, &mut bytes).unwrap_err();
    assert!(matches!(error, WalkError::NotPresent { gva: 0x4000, .. }), "{error}");
    assert_eq!((bytes[0x7ff], bytes[0x800]), (b'd', b'b'));
    // A frame without memory.
    guest.put_word(PTE + 32, RAM as u64 | 7);
    let error = space.read(0x3800, &mut bytes).unwrap_err();
    assert!(matches!(error, WalkError::Page { gva: 0x4000, .. }), "{error}");
}

#[test]
fn what_is_mapped_later_is_found_and_what_was_changed_after_it_is_forgotten() {
    let guest = guest(0);
    guest.put_word(PTE, 0x20_0000 | 7);
    let space = space(&guest, 0);
    assert_eq!(space.translate(0x123).unwrap().gpa, 0x20_0123);
    assert!(space.translate(0x1000).is_err());
    guest.put_word(PTE + 8, 0x30_0000 | 7);
    assert_eq!(space.translate(0x1000).unwrap().gpa, 0x30_0000);
    guest.put_word(PTE, 0x40_0000 | 7);
    space.forget();
    assert_eq!(space.translate(0).unwrap().gpa, 0x40_0000);
}

#[test]
fn pages_that_may_not_be_accessed_are_read() {
    let guest = guest(0);
    guest.put(0x20_0000, b"guarded");
    // PROT_NONE, with the frame inverted (pgtable-invert.h).
    guest.put_word(PTE, !0x20_0000 & 0x000f_ffff_ffff_f000 | 1 << 8);
    let mut bytes = [0; 7];
    let space = space(&guest, 0);
    space.read(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"guarded");
    assert!(!space.translate(0).unwrap().permissions.is_user);
}

#[test]
fn the_bit_of_encryption_is_no_part_of_an_address() {
    let bit = 1 << 47;
    let guest = guest(bit);
    guest.put_word(PTE, 0x20_0000 | bit | 7);
    assert_eq!(space(&guest, bit).translate(5).unwrap().gpa, 0x20_0005);
    assert!(space(&guest, 0).translate(5).is_err());
}

#[test]
fn more_tables_than_are_kept_are_read_all_the_same() {
    let guest = guest(0);
    // Each entry of the second table leads to the same third one.
    for entry in 0..512 {
        guest.put_word(TABLES + 0x1000 + 8 * entry, (0x40_0000 + entry * 0x1000) | 7);
        guest.put_word(0x40_0000 + entry * 0x1000, (0x70_0000) | 7);
    }
    guest.put_word(0x70_0000, 0x20_0000 | 7);
    let space = space(&guest, 0);
    for _ in 0..2 {
        for entry in 0..512u64 {
            assert_eq!(space.translate(entry << 30).unwrap().gpa, 0x20_0000);
        }
    }
    assert_eq!(Place::FIRST.gpa + PAGE_TABLES, 0x50_0000);
}

/// Page table isolation, as Linux sets it up: the kernel's own table forbids to execute what is the
/// process's.
#[test]
fn the_kernels_table_does_not_say_that_a_process_cannot_execute() {
    const NO_EXECUTE: u64 = 1 << 63;
    let guest = guest(0);
    guest.put_word(PTE, 0x20_0000 | 7);
    guest.put_word(PTE + 8, 0x20_1000 | 7 | NO_EXECUTE);
    // The first half of the outermost table is the process's, the second the kernel's.
    guest.put_word(TABLES, (TABLES + 0x1000) | 7 | NO_EXECUTE);
    guest.put_word(TABLES + 256 * 8, (TABLES + 0x1000) | 7 | NO_EXECUTE);
    let space = space(&guest, 0);
    let is_executable = |gva| space.translate(gva).unwrap().permissions.is_executable;
    assert_eq!([0, 0x1000, 0xffff_8000_0000_0000].map(is_executable), [true, false, false]);
    assert!(space.walk(0).end.unwrap().permissions.is_executable);
}

#[test]
fn a_page_without_access_is_found_where_memory_is_encrypted() {
    const ENCRYPTION: u64 = 1 << 47;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let guest = guest(ENCRYPTION);
    // PROT_NONE as pgtable-invert.h stores it, with the bit of encryption as the kernel leaves it:
    // set or not.
    for (page, entry) in
        [!0x30_0000 & ADDRESS, !0x30_0000 & ADDRESS & !ENCRYPTION].into_iter().enumerate()
    {
        guest.put_word(PTE + 8 * page as u64, entry | 0x100 | 1 << 63);
        let found = space(&guest, ENCRYPTION).translate(page as u64 * 0x1000 + 0x12);
        assert_eq!(found.unwrap().gpa, 0x30_0012, "{entry:#x}");
    }
}

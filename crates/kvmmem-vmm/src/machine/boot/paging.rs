// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The boot CPU's 64-bit mode: GDT, page tables and system registers, as the 64-bit boot protocol
//! wants them (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use kvm_bindings::{kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{GDT, PAGE_TABLES};

const TABLE_BYTES: u64 = 4096;
const TABLE_ENTRIES: u64 = 512;
/// Page directories: one per GiB that is mapped, 4 GiB in all.
const DIRECTORIES: u64 = 4;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// Flat 64-bit code and data, at the selectors 0x10 and 0x18 that the protocol names.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Maps the first 4 GiB one to one by pages of 2 MiB, and writes the GDT.
pub(crate) fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let pointers = PAGE_TABLES.0 + TABLE_BYTES;
    let directories = pointers + TABLE_BYTES;
    write_qwords(memory, PAGE_TABLES.0, [pointers | PRESENT_WRITABLE])?;
    write_qwords(
        memory,
        pointers,
        (0..DIRECTORIES).map(|i| (directories + i * TABLE_BYTES) | PRESENT_WRITABLE),
    )?;
    let pages =
        (0..DIRECTORIES * TABLE_ENTRIES).map(|i| (i * LARGE_PAGE_BYTES) | LARGE | PRESENT_WRITABLE);
    write_qwords(memory, directories, pages)?;
    write_qwords(memory, GDT.0, GDT_ENTRIES)
}

fn write_qwords(
    memory: &GuestMemoryMmap,
    address: u64,
    qwords: impl IntoIterator<Item = u64>,
) -> Result<(), GuestMemoryError> {
    let bytes: Vec<u8> = qwords.into_iter().flat_map(u64::to_le_bytes).collect();
    memory.write_slice(&bytes, GuestAddress(address))
}

/// `sregs` of a CPU at reset, changed to 64-bit mode with the tables above.
pub(crate) fn boot_sregs(mut sregs: kvm_sregs) -> kvm_sregs {
    const CR0_PE: u64 = 1 << 0;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
    const GDT_LIMIT: u16 = 4 * 8 - 1;

    let flat = |selector, type_, l| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1 - l,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    let data = flat(0x18, 0x3, 0);
    sregs.cs = flat(0x10, 0xb, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT.0;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = PAGE_TABLES.0;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.efer |= EFER_LME_LMA;
    sregs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_gib_are_mapped_one_to_one() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        write_page_tables(&memory).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            memory.read_obj(GuestAddress(table + index * 8)).unwrap()
        };
        for gva in [0, 0x1234_5678, 0x7fff_ffff, 0xffff_ffff_u64] {
            let pointers = entry(PAGE_TABLES.0, gva >> 39) & !0xfff;
            let directory = entry(pointers, gva >> 30 & 511) & !0xfff;
            let page = entry(directory, gva >> 21 & 511);
            assert_eq!(page & 0x83, 0x83);
            assert_eq!((page & !0x1f_ffff) + (gva & 0x1f_ffff), gva);
        }
        assert_eq!(entry(PAGE_TABLES.0, 1), 0);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Page tables that a builder wrote, and hostile ones.

use std::collections::BTreeMap;
use std::io;

use kvmmem_memory::paging::{
    Absent, AddressSpace, Entry, Levels, Permissions, Translation, WalkError,
};
use proptest::prelude::*;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Where the builder puts its tables.
const TABLES: u64 = 0x10_0000_0000;

/// Sparse memory of a target: words by GPA.
#[derive(Default)]
struct Memory {
    words: BTreeMap<u64, u64>,
    /// Pages that exist.
    pages: BTreeMap<u64, ()>,
}

impl Memory {
    fn set(&mut self, gpa: u64, value: u64) {
        self.words.insert(gpa, value);
        self.pages.insert(gpa >> 12, ());
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        for (at, byte) in (gpa..).zip(buf) {
            if !self.pages.contains_key(&(at >> 12)) {
                return Err(io::Error::other(format!("no memory at {at:#x}")));
            }
            let word = self.words.get(&(at & !7)).copied().unwrap_or(0);
            *byte = word.to_le_bytes()[usize::try_from(at % 8).unwrap()];
        }
        Ok(())
    }
}

/// Writes tables as a kernel does.
struct Builder {
    memory: Memory,
    levels: Levels,
    next: u64,
}

impl Builder {
    fn new(levels: Levels) -> Self {
        let mut memory = Memory::default();
        memory.set(TABLES, 0);
        Self { memory, levels, next: TABLES + 0x1000 }
    }

    /// Maps the page of `1 << (12 + 9 * (leaf - 1))` bytes; `false` where something is mapped
    /// already.
    fn map(&mut self, gva: u64, gpa: u64, leaf: u8, flags: u64) -> bool {
        let mut table = TABLES;
        for level in (leaf..=self.levels.count()).rev() {
            let at = table + (gva >> (12 + 9 * (level - 1)) & 511) * 8;
            let entry = self.memory.words.get(&at).copied().unwrap_or(0);
            if level == leaf {
                let large = if leaf > 1 { LARGE } else { 0 };
                if entry == 0 {
                    self.memory.set(at, gpa | flags | large | PRESENT);
                }
                return entry == 0;
            }
            if entry & LARGE != 0 {
                return false;
            }
            table = entry & ADDRESS;
            if entry == 0 {
                table = self.next;
                self.next += 0x1000;
                self.memory.set(table, 0);
                self.memory.set(at, table | PRESENT | WRITABLE | USER);
            }
        }
        false
    }

    fn space(&self) -> AddressSpace {
        // A PCID and the bit that keeps the TLB do not count.
        AddressSpace { cr3: TABLES | 0xabc | 1 << 63, levels: self.levels }
    }
}

fn levels() -> impl Strategy<Value = Levels> {
    prop_oneof![Just(Levels::Four), Just(Levels::Five)]
}

/// The address with its unused bits as the highest used one.
fn canonical(gva: u64, levels: Levels) -> u64 {
    let shift = 64 - levels.address_bits();
    ((gva << shift).cast_signed() >> shift).cast_unsigned()
}

proptest! {
    #[test]
    fn what_was_mapped_is_found_and_nothing_else(
        levels in levels(),
        // Few distinct addresses, so that mappings share tables and collide.
        pages in proptest::collection::vec((0u64..4, 0u64..4, 0u64..4, 0u64..4, 0u64..4, 1u8..=3, any::<u64>(), any::<[bool; 3]>()), 1..24),
        offset: u64,
        stray: u64,
    ) {
        let mut builder = Builder::new(levels);
        let mut mapped = Vec::new();
        for (l5, l4, l3, l2, l1, leaf, gpa, [write, user, no_execute]) in pages {
            let size = 1u64 << (12 + 9 * (leaf - 1));
            // The last table of each level and its first ones.
            let index = |i: u64| if i == 3 { 511 } else { i };
            let gva = [l1, l2, l3, l4, l5].into_iter().enumerate().fold(0, |gva, (n, i)| gva | index(i) << (12 + 9 * n));
            let gva = canonical(gva & !(size - 1), levels);
            let gpa = gpa & ADDRESS & !(size - 1);
            let flag = |set, flag| if set { flag } else { 0 };
            let flags = flag(write, WRITABLE) | flag(user, USER) | flag(no_execute, NO_EXECUTE);
            if builder.map(gva, gpa, leaf, flags) {
                let permissions = Permissions { is_writable: write, is_user: user, is_executable: !no_execute };
                mapped.push((gva, size, gpa, permissions));
            }
        }
        let space = builder.space();
        for (gva, size, gpa, permissions) in &mapped {
            let within = offset % size;
            let walk = space.walk(gva + within, |gpa, buf| builder.memory.read(gpa, buf));
            let expected = Translation { gpa: gpa + within, page_size: *size, permissions: *permissions };
            prop_assert_eq!(walk.end.unwrap(), expected);
            prop_assert_eq!(walk.entries[0].level, levels.count());
        }
        let stray = canonical(stray, levels);
        let is_mapped = mapped.iter().any(|(gva, size, ..)| stray >= *gva && stray - gva < *size);
        let walk = space.walk(stray, |gpa, buf| builder.memory.read(gpa, buf));
        prop_assert_eq!(walk.end.is_ok(), is_mapped);
    }

    #[test]
    fn any_tables_end_a_walk(levels in levels(), cr3: u64, gva: u64, seed: u64) {
        // Every word of memory is some number.
        let mut reads = 0;
        let walk = AddressSpace { cr3, levels }.walk(gva, |gpa, buf| {
            reads += 1;
            assert!(gpa % 8 == 0 && gpa < 1 << 52, "{gpa:#x}");
            let word = (gpa ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | PRESENT;
            buf.copy_from_slice(&word.to_le_bytes());
            Ok::<_, io::Error>(())
        });
        prop_assert!(reads <= usize::from(levels.count()));
        prop_assert_eq!(walk.entries.len(), reads);
        if let Ok(found) = walk.end {
            prop_assert!(found.gpa < 1 << 52);
            prop_assert_eq!(found.gpa % found.page_size, gva % found.page_size);
        }
        prop_assert_eq!(reads == 0, !levels.is_canonical(gva));
    }

    #[test]
    fn reading_crosses_pages_as_byte_by_byte_translation_does(start in 0u64..0x2000, len in 0usize..0x1800) {
        // Two pages that are neighbours here and apart there, and a third that is not mapped.
        let mut builder = Builder::new(Levels::Four);
        let frames = [0x7000, 0x3000];
        for (page, frame) in (0..).zip(frames) {
            builder.map(0x40_0000 + page * 0x1000, frame, 1, 0);
            for word in 0..512 {
                builder.memory.set(frame + word * 8, (frame + word) * 0x0101_0101_0101);
            }
        }
        let read = |gpa: u64, buf: &mut [u8]| builder.memory.read(gpa, buf);
        let gva = 0x40_0000 + start;
        let mut bytes = vec![0; len];
        let result = builder.space().read(gva, &mut bytes, read);
        if start + len as u64 <= 0x2000 {
            prop_assert!(result.is_ok());
            for (at, byte) in (gva..).zip(bytes.iter().copied()).step_by(61) {
                let mut expected = [0];
                read(builder.space().walk(at, read).end.unwrap().gpa, &mut expected).unwrap();
                prop_assert_eq!(byte, expected[0]);
            }
        } else {
            let error = result.unwrap_err();
            let not_present = matches!(error, WalkError::NotPresent { gva: 0x40_2000, .. });
            prop_assert!(not_present);
            // What lies before is there.
            let whole = usize::try_from(error.gva() - gva).unwrap();
            let mut part = vec![0; whole];
            builder.space().read(gva, &mut part, read).unwrap();
            prop_assert_eq!(&part, &bytes[..whole]);
        }
    }
}

/// As a kernel and a process have them: large pages and small ones with data in both halves.
fn usual(levels: Levels, data: impl Fn(u64) -> u64) -> Builder {
    let mut builder = Builder::new(levels);
    let top = canonical(1 << (levels.address_bits() - 1), levels);
    let places = [(0x40_0000, 40), (0x7fff_0000_0000, 7), (top + (1 << 36), 9), (!0x1f_ffff, 12)];
    for (number, (gva, pages)) in (0u64..).zip(places) {
        for page in 0..pages {
            let gpa = (1 + number * 64 + page) << 12;
            builder.map(gva + (page << 12), gpa, 1, USER | WRITABLE);
            for word in 0..512 {
                builder.memory.set(gpa + word * 8, data(gpa + word * 8));
            }
        }
    }
    builder
}

#[test]
fn the_depth_is_found_out_where_the_tables_show_it() {
    let detect = |builder: &Builder| {
        Levels::detect(builder.space().cr3, |gpa, buf| {
            assert!(buf.len() <= 4096);
            builder.memory.read(gpa, buf)
        })
    };
    let text = |_| u64::from_le_bytes(*b"a string");
    let pointers = |gpa: u64| 0xffff_8880_0000_0000 + gpa * 8;
    let code = |gpa: u64| (gpa + 7).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for levels in [Levels::Four, Levels::Five] {
        for data in [&text as &dyn Fn(u64) -> u64, &pointers, &code, &|_| 0] {
            let builder = usual(levels, data);
            let detected = detect(&builder);
            // Tables of four levels with nothing but zeros behind them could be both.
            let is_zero = levels == Levels::Four && data(0) == 0;
            assert_eq!(detected, if is_zero { None } else { Some(levels) }, "{:#x}", data(0));
        }
        // Large pages alone.
        let mut builder = Builder::new(levels);
        builder.map(!0x7fff_ffff + 0x100_0000, 0x4020_0000, 2, WRITABLE);
        assert_eq!(detect(&builder), Some(levels));
        assert_eq!(detect(&Builder::new(levels)), None);
        // An entry that leads back to its table.
        let mut builder = usual(levels, text);
        builder.memory.set(TABLES + 300 * 8, TABLES | PRESENT | WRITABLE);
        assert_eq!(detect(&builder), Some(levels));
    }
    assert_eq!(Levels::detect(0, |_, _| Err(io::Error::other("nothing"))), None);
}

proptest! {
    #[test]
    fn any_tables_end_the_search_for_their_depth(cr3: u64, seed: u64) {
        let mut reads = 0;
        let _ = Levels::detect(cr3, |gpa, buf| {
            reads += 1;
            assert!(buf.len() <= 4096 && gpa < 1 << 52, "{gpa:#x}");
            for (word, at) in buf.chunks_mut(8).zip(gpa..) {
                let value = (at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) & !LARGE | PRESENT;
                word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
            }
            Ok::<_, io::Error>(())
        });
        prop_assert!(reads < 1000, "{reads}");
    }

    #[test]
    fn any_entry_that_is_not_present_has_a_place_below_the_end(level in 1u8..=5, value: u64, gva: u64) {
        let entry = Entry { level, gpa: 0, value };
        match entry.absent(gva) {
            None => prop_assert_eq!(value & PRESENT, PRESENT),
            Some(Absent::ProtNone { gpa } | Absent::Transition { gpa }) => prop_assert!(gpa < 1 << 52),
            Some(Absent::Unknown) => {}
        }
    }
}

#[test]
fn entries_that_are_not_present_mean_something_to_the_kernel() {
    let absent = |level, value, gva| Entry { level, gpa: 0, value }.absent(gva);
    let inverted = |gpa: u64| !gpa & ADDRESS;
    let cases = [
        (1, 0, Absent::Unknown),
        (1, inverted(0x5000) | 0x100, Absent::ProtNone { gpa: 0x5123 }),
        // Soft-dirty is the bit that Windows uses for pages in transition.
        (1, inverted(0x5000) | 0x900, Absent::ProtNone { gpa: 0x5123 }),
        (2, inverted(0x60_0000) | 0x180, Absent::ProtNone { gpa: 0x74_5123 }),
        (2, inverted(0x60_0000) | 0x100, Absent::Unknown),
        (4, inverted(0x60_0000) | 0x180, Absent::Unknown),
        // A swap entry of Linux: the offset is inverted as well.
        (1, !0x1ff & !(0x1f << 59) & !(0x1234 << 9), Absent::Unknown),
        (1, 0x5000 | 0x880, Absent::Transition { gpa: 0x5123 }),
        (1, 0x5000 | 0x980, Absent::Transition { gpa: 0x5123 }),
        (2, 0x5000 | 0x880, Absent::Transition { gpa: 0x5000 }),
        (1, 0x5000 | 0xc80, Absent::Unknown),
    ];
    for (level, value, expected) in cases {
        assert_eq!(absent(level, value, 0x14_5123), Some(expected), "level {level} {value:#x}");
    }
    assert_eq!(absent(1, 0x5001, 0), None);
}

#[test]
fn a_page_table_whose_pages_cannot_be_read_does_not_tell_the_levels() {
    let mut memory = Memory::default();
    let entries = [
        (0x20_0000, 0x20_1000),
        (0x20_1000, 0x20_2000),
        (0x20_2010, 0x20_3000),
        (0x20_3010, 0x20_4000),
    ];
    for (place, table) in entries {
        memory.set(place, table | PRESENT | WRITABLE | USER);
    }
    for (frame, expected) in [(0xd000_0000, None), (0x6c6c_6548_2000, Some(Levels::Four))] {
        memory.set(0x20_4000, frame | PRESENT | WRITABLE | USER);
        let read = |gpa: u64, buf: &mut [u8]| match gpa {
            0x20_0000..0x20_5000 => memory.read(gpa, buf),
            _ => Err(io::Error::other("a hole")),
        };
        assert_eq!(Levels::detect(0x20_0000, read), expected, "{frame:#x}");
    }
}

#[test]
fn a_table_that_points_at_itself_ends_a_walk() {
    // The recursive mapping that some kernels use: every level reads the same entry.
    let mut memory = Memory::default();
    memory.set(0x1000 + 511 * 8, 0x1000 | PRESENT | WRITABLE);
    for levels in [Levels::Four, Levels::Five] {
        let space = AddressSpace { cr3: 0x1000, levels };
        let walk = space.walk(u64::MAX, |gpa, buf| memory.read(gpa, buf));
        assert_eq!(walk.end.unwrap().gpa, 0x1fff);
        assert_eq!(walk.entries.len(), usize::from(levels.count()));
    }
}

#[test]
fn reserved_bits_are_refused_where_the_manuals_reserve_them() {
    // Level, bits that are set, and which of these are reserved.
    let cases = [
        (5, LARGE, LARGE),
        (4, LARGE, LARGE),
        (3, LARGE | 1 << 13, 1 << 13),
        (3, LARGE | 1 << 29, 1 << 29),
        (3, LARGE | 1 << 12 | 1 << 30, 0),
        (2, LARGE | 1 << 20, 1 << 20),
        (2, LARGE | 1 << 12 | 1 << 21, 0),
        (1, LARGE | 0x7ff << 52, 0),
    ];
    for (level, bits, reserved) in cases {
        let mut memory = Memory::default();
        for above in level..=5u64 {
            memory.set(above << 12, (above - 1) << 12 | PRESENT);
        }
        memory.set(level << 12, bits | PRESENT);
        let space = AddressSpace { cr3: 5 << 12, levels: Levels::Five };
        let end = space.walk(0, |gpa, buf| memory.read(gpa, buf)).end;
        match end {
            Err(WalkError::Reserved { reserved: found, entry, .. }) => {
                assert_eq!((found, u64::from(entry.level)), (reserved, level), "{bits:#x}");
            }
            Ok(_) => assert_eq!(reserved, 0, "level {level} {bits:#x}"),
            Err(error) => panic!("level {level} {bits:#x}: {error}"),
        }
    }
}

#[test]
fn errors_name_the_address_and_the_entry() {
    let mut memory = Memory::default();
    memory.set(0x1000, 0x2000 | PRESENT);
    let space = AddressSpace { cr3: 0x1000, levels: Levels::Four };
    let error =
        |gva| space.walk(gva, |gpa, buf| memory.read(gpa, buf)).end.unwrap_err().to_string();
    assert_eq!(
        error(0x1234),
        "cannot read the level 3 page table entry of gva 0x1234, at gpa 0x2000"
    );
    assert_eq!(
        error(1 << 39),
        "gva 0x8000000000 is not mapped: the PML4E 0x0 at gpa 0x1008 is not present"
    );
    assert_eq!(error(1 << 47), "gva 0x800000000000 is not canonical with 4 levels of page tables");
    memory.set(0x2000, LARGE | PRESENT);
    let mut bytes = [0; 16];
    let read = |gpa: u64, buf: &mut [u8]| memory.read(gpa, buf);
    let error = space.read(0x5000, &mut bytes, read).unwrap_err().to_string();
    assert_eq!(error, "cannot read gva 0x5000, which is gpa 0x5000");
}

#[test]
fn the_last_byte_of_the_address_space_can_be_read() {
    let mut builder = Builder::new(Levels::Four);
    builder.map(!0xfff, 0x5000, 1, 0);
    builder.memory.set(0x5ff8, u64::MAX);
    let read = |gpa: u64, buf: &mut [u8]| builder.memory.read(gpa, buf);
    let mut bytes = [0; 8];
    builder.space().read(u64::MAX - 7, &mut bytes, read).unwrap();
    assert_eq!(bytes, [0xff; 8]);
    let error = builder.space().read(u64::MAX - 6, &mut bytes, read).unwrap_err();
    assert!(matches!(error, WalkError::End { len: 8, .. }), "{error}");
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernels that lie: bytes of the note, the tables, the types and the lists are anything.

mod common;

use std::time::{Duration, Instant};

use common::{BTF, Guest, KALLSYMS, Layout, PAGE_TABLES, Place, TASKS};
use kvmmem_linux::btf::Types;
use kvmmem_linux::identity::Identity;
use kvmmem_linux::log;
use kvmmem_linux::search::Notes;
use kvmmem_linux::{Find, FindError, Kernel, KernelError};
use kvmmem_memory::{Memory, MemoryError, Range};
use proptest::prelude::*;

/// All that a tool does with a kernel, which it finds by its note or by its page tables.
fn read(guest: &Guest, place: &Place, by_note: bool) {
    let (note, kernel) = (place.note, place.gpa + PAGE_TABLES);
    let find = match by_note {
        true => Find { note: Some(note), ..Find::default() },
        false => Find { kernel: Some(kernel), ..Find::default() },
    };
    if let Ok(kernel) = Kernel::find(guest, find) {
        read_all(&kernel);
    }
}

fn read_all(kernel: &Kernel<'_>) {
    if let Ok(symbols) = kernel.symbols() {
        assert!(symbols.iter().count() <= symbols.len());
        for address in [0, Place::FIRST.gva + TASKS, u64::MAX] {
            let _ = symbols.nearest(address);
        }
    }
    let _ = walk(kernel);
    let _ = (Identity::of(kernel), log::records(kernel).map(|records| records.take(1000).count()));
}

fn walk(kernel: &Kernel<'_>) -> Result<(), KernelError> {
    let head = kernel.symbol("init_task")?;
    let _ = kernel.enumerator("PIDTYPE_TGID");
    for path in ["tasks.next", "pid", "flags.odd", "comm", "comm.x", "tail.tail"] {
        let _ = kernel.member("task_struct", path);
    }
    let _ = kernel.size_of("wide");
    for task in kernel.list_of(head, "task_struct", "tasks")?.take(1000) {
        let task = kernel.object("task_struct", task?)?;
        let _ =
            (task.get("pid"), task.get_signed("flags.high"), task.text("comm").map(<[u8]>::len));
        let _ = kernel.read_cstr(task.gva(), 64);
    }
    Ok(())
}

fn layouts() -> impl Strategy<Value = Layout> {
    prop_oneof![
        Just(Layout::BeforeNames),
        Just(Layout::AfterIndex),
        Just(Layout::Unsigned),
        Just(Layout::FromPlace)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_byte_does_harm(
        layout in layouts(),
        five_levels: bool,
        by_note: bool,
        changes in proptest::collection::vec(
            (0usize..6, 0u64..0x2000, prop_oneof![Just(0u64), Just(u64::MAX), any::<u64>(), 0u64..0x4000], 1usize..9),
            1..12,
        ),
    ) {
        let place = Place { layout, five_levels, ..Place::FIRST };
        let guest = Guest::with(&[place]);
        for (part, offset, value, len) in changes {
            let at = match part {
                0 => place.note + offset % 0x400,
                1 => place.gpa + PAGE_TABLES + offset * 2,
                2 => place.gpa + KALLSYMS + offset * 10,
                3 => place.gpa + KALLSYMS + offset % 64,
                4 => place.gpa + BTF + offset % 0x400,
                _ => place.gpa + TASKS + offset % 0x100,
            };
            guest.put(at, &value.to_le_bytes()[..len]);
        }
        read(&guest, &place, by_note);
    }

    #[test]
    fn no_types_do_harm(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..16),
        cut: prop::sample::Index,
        is_cut: bool,
    ) {
        let mut blob = common::btf::kernel();
        for (at, byte) in changes {
            let at = at.index(blob.len());
            blob[at] = byte;
        }
        if is_cut {
            blob.truncate(cut.index(blob.len()));
        }
        if let Ok(types) = Types::parse(blob) {
            for name in ["task_struct", "wide", "list_head", "pid_t"] {
                if let Some(id) = types.find(name) {
                    let _ = (types.size(id), types.name(id).len());
                }
                for path in ["pid", "task.tasks.next.prev", "matrix", "low", "tasks.tasks"] {
                    let _ = types.member(name, path);
                }
            }
            let _ = types.enumerator("PIDTYPE_PID");
        }
    }
}

/// A structure whose members without a name are itself, many times.
#[test]
fn structures_within_themselves_end_a_search() {
    let mut btf = common::btf::Builder::default();
    let members: Vec<common::btf::Member<'_>> = (0..200).map(|_| ("", 1, 0, 0)).collect();
    btf.structure(4, "nest", 8, &members);
    let chain = btf.add("a", 8 << 24, 3, &[]);
    btf.add("b", 8 << 24, chain, &[]);
    let array = btf.array(4, u32::MAX);
    assert_eq!(array, 4);
    let types = Types::parse(btf.build()).unwrap();
    let start = Instant::now();
    assert!(types.member("nest", "x").is_err());
    assert_eq!((types.size(2), types.size(array)), (None, None));
    // Not in a million years, but in a moment.
    assert!(start.elapsed() < Duration::from_secs(60));
}

/// RAM full of notes: each is checked, and hides none of the others.
#[test]
fn decoys_hide_no_kernel() {
    let guest = Guest::with(&[Place::FIRST]);
    let note = guest.bytes(Place::FIRST.note, 0x1000);
    let mut decoy = note.clone();
    // A kernel of another name.
    let at = note.windows(6).position(|part| part == b"6.12.1").unwrap();
    decoy[at] = b'7';
    let pages = |range: std::ops::Range<u64>| {
        range
            .step_by(0x1000)
            .filter(|page| !(0x40_0000..0x80_0000).contains(page) && *page != Place::FIRST.note)
    };
    // 2,815 before the right one, and 255 after it.
    let ram = common::RAM as u64;
    pages(0..ram).for_each(|page| guest.put(page, &decoy));
    assert!(
        pages(0..Place::FIRST.note).count() > 1100 && pages(Place::FIRST.note..ram).count() > 200
    );
    for find in [Find::default(), Find { is_live: true, ..Find::default() }] {
        let kernel = Kernel::find(&guest, find).unwrap();
        assert_eq!(kernel.note().gpa, Some(Place::FIRST.note));
    }
    let notes = Notes::find(&guest, |_| true).unwrap();
    assert_eq!(
        (notes.fitting.len(), notes.count, notes.is_cut),
        (1, pages(0..ram).count() + 1, false)
    );
    // The same text, over and over, is one note.
    pages(0..ram).for_each(|page| guest.put(page, &note));
    let notes = Notes::find(&guest, |_| true).unwrap();
    assert_eq!((notes.fitting.len(), notes.is_cut), (1, false));
}

/// Notes that fit, and differ in a line without meaning.
#[test]
fn forged_notes_are_told_by_their_symbols_or_reported() {
    let guest = Guest::with(&[Place::FIRST]);
    let note = guest.bytes(Place::FIRST.note, 0x1000);
    let mut forged = note.clone();
    let symbols = note.windows(11).position(|part| part == b"SYMBOL(prb)").unwrap();
    let build = note.windows(9).position(|part| part == b"BUILD-ID=").unwrap() + 9;
    // Its symbols are not those of the kernel.
    forged[symbols + 12] = b'e';
    let mut forge = |number: u8| {
        forged[build..build + 2].copy_from_slice(&[b'a' + number / 16, b'a' + number % 16]);
        guest.put(0x10_0000 + 0x1000 * u64::from(number), &forged);
    };
    (0..60).for_each(&mut forge);
    assert_eq!(Kernel::find(&guest, Find::default()).unwrap().note().gpa, Some(Place::FIRST.note));
    // More than a guest can have: which one is right is not guessed.
    (60..70).for_each(&mut forge);
    let error = Kernel::find(&guest, Find::default()).unwrap_err();
    assert!(matches!(error, FindError::TooMany), "{error}");
    let find = Find { note: Some(Place::FIRST.note), ..Find::default() };
    assert_eq!(Kernel::find(&guest, find).unwrap().note().gpa, Some(Place::FIRST.note));
}

/// A kernel in the last GiB, whose note lacks the places of the symbols.
const LAST: Place =
    Place { gva: 0xffff_ffff_c020_0000, layout: Layout::BeforeNames, ..Place::FIRST };

/// Where the last 2 MiB of its addresses lead, and where they end.
const TOP: std::ops::Range<u64> = 0xc0_0000..0xe0_0000;

/// The kernel, with its last 2 MiB of addresses mapped.
fn mapped_to_the_top() -> Guest {
    let guest = Guest::with(&[LAST]);
    guest.put_word(LAST.gpa + PAGE_TABLES + 0x2000 + 511 * 8, TOP.start | 0x83);
    guest
}

fn address_of(guest: &Guest, name: &str) -> Option<u64> {
    let find = Find { note: Some(LAST.note), ..Find::default() };
    Kernel::find(guest, find).unwrap().symbol(name).ok()
}

/// There is no address after the last: a search for symbols ends there.
#[test]
fn a_search_for_symbols_ends_at_the_last_address() {
    let guest = mapped_to_the_top();
    assert_eq!(address_of(&guest, "_stext"), Some(LAST.gva));
    // What looks like the table of tokens ends there, so that its index lies nowhere.
    guest.put(LAST.gpa + KALLSYMS, &vec![0; usize::try_from(BTF - KALLSYMS).unwrap()]);
    let tokens = [&[0; 49][..], b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00", &[0; 198]];
    let tokens = tokens.concat();
    guest.put(TOP.end - tokens.len() as u64, &tokens);
    assert_eq!(address_of(&guest, "_stext"), None);
}

#[test]
fn symbols_that_end_at_the_last_address_are_read() {
    let guest = mapped_to_the_top();
    let tables = guest.bytes(LAST.gpa + KALLSYMS, usize::try_from(BTF - KALLSYMS).unwrap());
    let end = tables.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    guest.put(LAST.gpa + KALLSYMS, &vec![0; tables.len()]);
    assert_eq!(address_of(&guest, "_stext"), None);
    guest.put(TOP.end - end as u64, &tables[..end]);
    assert_eq!(address_of(&guest, "_stext"), Some(LAST.gva));
}

/// Memory of 4 EiB, all of it data.
struct Endless;

impl Memory for Endless {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        buf.fill(0);
        Ok(())
    }

    fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
        Ok(vec![Range { gpa: 0, len: 1 << 62 }])
    }
}

/// A dump that says that it is huge costs the search no memory.
#[test]
fn a_search_needs_no_memory_for_what_follows() {
    let notes = Notes::find(&Endless, |_| false).unwrap();
    assert_eq!((notes.count, notes.is_cut), (0, false));
}

/// Names that are the same, in any number, do not make look-ups slow: some of them count.
#[test]
fn of_names_that_are_the_same_a_look_up_takes_some() {
    let guest = Guest::default();
    let same = (0..5000).map(|n| ('t', "same".to_owned(), Place::FIRST.gva + 0x1000 + n / 4999));
    guest.boot_with(&Place::FIRST, &common::btf::kernel(), same.collect());
    let kernel = Kernel::find(&guest, Find::default()).unwrap();
    let symbols = kernel.symbols().unwrap();
    assert_eq!(symbols.all("same").count(), 4096);
    assert_eq!(symbols.at_address(Place::FIRST.gva + 0x1000).count(), 4096);
    let mut btf = common::btf::Builder::default();
    (0..5000).for_each(|_| _ = btf.int("same", 4));
    btf.structure(4, "same", 8, &[]);
    assert_eq!(Types::parse(btf.build()).unwrap().find("same"), Some(1));
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernels that a builder wrote into memory, read back.

mod common;

use common::{
    BTF, Guest, JIFFIES, KALLSYMS, Layout, NAMES, PAGE_TABLES, Place, RELEASE, TASKS, UTS,
};
use kvmmem_linux::btf::Member;
use kvmmem_linux::identity::Identity;
use kvmmem_linux::symbols::{Symbol, TableError};
use kvmmem_linux::{Find, FindError, Kernel, KernelError};
use kvmmem_memory::Memory;

const LIVE: Find = Find { is_live: true, note: None, cr3: None, lstar: None, kernel: None };

fn kernel(guest: &Guest) -> Kernel<'_> {
    Kernel::find(guest, Find::default()).unwrap()
}

fn tasks(kernel: &Kernel<'_>) -> Result<Vec<(u64, String)>, KernelError> {
    let head = kernel.symbol("init_task")? + kernel.offset("task_struct", "tasks")?;
    let task = |gva: Result<u64, KernelError>| {
        let task = kernel.object("task_struct", gva?)?;
        Ok((task.get("pid")?, String::from_utf8_lossy(task.text("comm")?).into_owned()))
    };
    kernel.list_of(head, "task_struct", "tasks")?.map(task).collect()
}

#[test]
fn every_layout_of_the_symbol_table_is_read() {
    let layouts = [Layout::BeforeNames, Layout::AfterIndex, Layout::Unsigned, Layout::FromPlace];
    for (layout, five_levels) in layouts.into_iter().zip([false, true, false, true]) {
        let place = Place { layout, five_levels, ..Place::FIRST };
        let guest = Guest::with(&[place]);
        let kernel = kernel(&guest);
        assert_eq!(kernel.note().release(), Some(RELEASE), "{layout:?}");
        let symbols = kernel.symbols().unwrap();
        assert_eq!(symbols.len(), 2610);
        assert_eq!(symbols.get("_stext"), Some(place.gva), "{layout:?}");
        assert_eq!(symbols.get("filler_1234"), Some(place.gva + 0x1000 + 16 * 1234));
        assert_eq!(symbols.get("filler_"), None);
        for symbol in symbols.iter() {
            assert_eq!(
                symbols.all(&symbol.name).collect::<Vec<u64>>(),
                [symbol.address],
                "{layout:?}"
            );
        }
        let name = String::from("init_task");
        let symbol = Symbol { name, kind: 'D', address: place.gva + TASKS };
        assert_eq!(symbols.nearest(place.gva + TASKS), Some(symbol.clone()));
        assert_eq!(symbols.nearest(place.gva + TASKS + 9), Some(symbol));
        let names: Vec<(u64, String)> =
            NAMES[1..].iter().map(|(pid, name)| (u64::from(*pid), (*name).to_owned())).collect();
        assert_eq!(tasks(&kernel).unwrap(), names);
    }
}

#[test]
fn a_table_that_does_not_fit_the_note_is_refused() {
    // An address, and a name without which too few are left that the note has as well.
    for (old, new) in [
        (&b"SYMBOL(prb)=f"[..], &b"SYMBOL(prb)=e"[..]),
        (b"SYMBOL(prb)=ffffffff8", b"SYMBOL(prb)=ffffffff9"),
        (b"SYMBOL(prb)", b"SYMBOL(brp)"),
    ] {
        let guest = Guest::with(&[Place::FIRST]);
        let note = guest.bytes(Place::FIRST.note, 0x1000);
        let at = note.windows(old.len()).position(|part| part == old).unwrap();
        guest.put(Place::FIRST.note + at as u64, new);
        let error = kernel(&guest).symbols().unwrap_err();
        assert!(
            matches!(&error, KernelError::Symbols(error) if matches!(**error, TableError::Addresses)),
            "{error:?}"
        );
    }
}

#[test]
fn members_are_found_by_their_paths() {
    let guest = Guest::with(&[Place::FIRST]);
    let kernel = kernel(&guest);
    let place = |structure: &str, path: &str| {
        kernel.member(structure, path).map(|member| (member.offset, member.size))
    };
    assert_eq!(place("task_struct", "tasks.prev").unwrap(), (8, 8));
    assert_eq!(
        place("task_struct", "pid").unwrap(),
        (24, 4),
        "through two structures without a name"
    );
    assert_eq!(place("task_struct", "none").unwrap(), (16, 0), "of type void");
    assert_eq!(place("wide", "matrix").unwrap(), (0, 48));
    assert_eq!(place("wide", "task.flags.high").unwrap(), (28, 1));
    assert_eq!((kernel.size_of("task_struct").unwrap(), kernel.size_of("pid_t").unwrap()), (64, 4));
    assert_eq!(kernel.enumerator("PIDTYPE_TGID").unwrap(), 1);
    assert_eq!(kernel.enumerator("PIDTYPE_NONE").unwrap(), -1);
    for (structure, path, text) in [
        ("task_struct", "pids", "this kernel's task_struct has no member pids"),
        ("task_struct", "", "has no member"),
        ("task_struct", "pid.x", "has no member pid.x"),
        ("task_struct", "flags.odd.x", "has no member"),
        ("net_device", "name", "this kernel has no type net_device"),
    ] {
        let error = place(structure, path).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let task = kernel.object("task_struct", Place::FIRST.gva + TASKS).unwrap();
    // 0b101_101_00
    let bits = ["flags.low", "flags.odd", "flags.high"].map(|path| task.get(path).unwrap());
    assert_eq!((bits, task.get_signed("flags.high").unwrap()), ([0, 5, 5], -3));
    assert_eq!(task.value(&kernel.member("task_struct", "flags.odd").unwrap()).unwrap(), 5);
    let beyond = Member { offset: 62, ..kernel.member("task_struct", "pid").unwrap() };
    assert!(matches!(task.value(&beyond), Err(KernelError::Malformed { .. })));
    assert!(matches!(task.get("comm"), Err(KernelError::Malformed { .. })));
    assert!(task.has("tail") && !task.has("head"));
}

#[test]
fn of_several_kernels_the_one_whose_clock_ticks_is_right() {
    let mut guest = Guest::with(&[Place::FIRST, Place::SECOND]);
    for find in [Find::default(), LIVE] {
        let error = Kernel::find(&guest, find).unwrap_err();
        let text = error.to_string();
        let FindError::Ambiguous { candidates } = error else { panic!("{text}") };
        assert_eq!(
            candidates.iter().filter_map(|found| found.note.gpa).collect::<Vec<_>>(),
            [0xe0_0000, 0xf0_0000]
        );
        assert!(
            text.contains("note at gpa 0xe00000 (release 6.12.1-test, build ffffffff9a4"),
            "{text}"
        );
    }
    for place in [Place::FIRST, Place::SECOND] {
        guest.clocks = vec![place.gpa + JIFFIES];
        let found = Kernel::find(&guest, LIVE).unwrap();
        assert_eq!(found.symbol("_stext").unwrap(), place.gva);
        // The caller's choice.
        let found =
            Kernel::find(&guest, Find { note: Some(place.note), ..Find::default() }).unwrap();
        assert_eq!(found.symbol("_stext").unwrap(), place.gva);
    }
    let error = Kernel::find(&guest, Find { note: Some(0x1000), ..LIVE }).unwrap_err();
    assert!(matches!(error, FindError::NotThere { gpa: 0x1000 }), "{error}");
}

#[test]
fn of_several_kernels_the_one_in_the_address_space_of_a_vcpu_is_right() {
    let guest = Guest::with(&[Place::FIRST, Place::SECOND]);
    for place in [Place::FIRST, Place::SECOND] {
        // A process's table, with the entry accessed; the table of user mode after it.
        let kernel = u64::from_le_bytes(
            guest.bytes(place.gpa + PAGE_TABLES + 511 * 8, 8).try_into().unwrap(),
        );
        guest.put_word(0xa0_0000 + 511 * 8, kernel | 0x20);
        for cr3 in [place.gpa + PAGE_TABLES, 0xa0_0000, 0xa0_1005] {
            let found = Kernel::find(&guest, Find { cr3: Some(cr3), ..Find::default() }).unwrap();
            assert_eq!(found.symbol("_stext").unwrap(), place.gva);
        }
    }
    for cr3 in [0, 0xb0_0000, u64::MAX] {
        let found = Kernel::find(&guest, Find { cr3: Some(cr3), ..Find::default() });
        assert!(matches!(found, Err(FindError::Ambiguous { .. })));
    }
}

#[test]
fn a_kernel_without_a_note_is_found() {
    let layouts = [Layout::BeforeNames, Layout::AfterIndex, Layout::Unsigned, Layout::FromPlace];
    for (layout, five_levels) in
        layouts.into_iter().flat_map(|layout| [(layout, false), (layout, true)])
    {
        let place = Place { layout, five_levels, ..Place::SECOND };
        let guest = Guest::with(&[place]);
        let with_note = kernel(&guest);
        let expected = tasks(&with_note).unwrap();
        let root = with_note.space().root();
        guest.put(place.note, &[0; 0x1000]);
        // A process's table, and that of user mode after it, which has nothing of the kernel.
        guest.put_word(0xa0_0000 + 511 * 8, word(&guest, place.gpa + PAGE_TABLES + 511 * 8) | 0x20);
        let own = place.gpa + PAGE_TABLES;
        let by_cr3 =
            [own, 0xa0_0000, 0xa0_1005].map(|cr3| Find { cr3: Some(cr3), ..Find::default() });
        let named = Find { kernel: Some(own), ..LIVE };
        for find in [Find::default(), LIVE, named].into_iter().chain(by_cr3) {
            let kernel = Kernel::find(&guest, find).unwrap();
            assert_eq!(
                (kernel.note().gpa, kernel.space().root()),
                (None, root),
                "{layout:?} {find:?}"
            );
            assert_eq!(tasks(&kernel).unwrap(), expected, "{layout:?}");
            let identity = Identity::of(&kernel).unwrap();
            assert_eq!(identity.release, RELEASE);
            assert!(kernel.is_in_memory().unwrap());
        }
        // Its own name is no longer there.
        let kernel = Kernel::find(&guest, LIVE).unwrap();
        guest.put(place.gpa + UTS + 130, b"7");
        assert!(!kernel.is_in_memory().unwrap());
    }
}

fn word(guest: &Guest, gpa: u64) -> u64 {
    u64::from_le_bytes(guest.bytes(gpa, 8).try_into().unwrap())
}

/// A kernel that has no note runs where another one, before a reset, has left its own.
#[test]
fn the_note_of_another_kernel_is_not_taken_for_that_in_the_address_space_of_a_vcpu() {
    let guest = Guest::with(&[Place::FIRST, Place::SECOND]);
    guest.put(Place::SECOND.note, &[0; 0x1000]);
    let find = |cr3| {
        Kernel::find(&guest, Find { cr3, ..Find::default() }).unwrap().symbol("_stext").unwrap()
    };
    assert_eq!(find(Some(Place::SECOND.gpa + PAGE_TABLES)), Place::SECOND.gva);
    // Of firmware.
    for cr3 in [None, Some(0xb0_0000), Some(Place::FIRST.gpa + PAGE_TABLES)] {
        assert_eq!(find(cr3), Place::FIRST.gva);
    }
}

#[test]
fn of_several_kernels_without_notes_the_right_one_is_told_or_all_are_reported() {
    let mut guest = Guest::with(&[Place::FIRST, Place::SECOND]);
    for place in [Place::FIRST, Place::SECOND] {
        guest.put(place.note, &[0; 0x1000]);
    }
    let FindError::Ambiguous { candidates } = Kernel::find(&guest, Find::default()).unwrap_err()
    else {
        panic!("one was taken")
    };
    let found: Vec<_> = candidates.iter().map(|found| (found.note.gpa, found.cr3)).collect();
    let tables = [Place::FIRST, Place::SECOND].map(|place| (None, place.gpa + PAGE_TABLES));
    assert_eq!(found, tables);
    for place in [Place::FIRST, Place::SECOND] {
        let cr3 = place.gpa + PAGE_TABLES;
        guest.clocks = vec![place.gpa + JIFFIES];
        let (by_cr3, named) = (Find { cr3: Some(cr3), ..LIVE }, Find { kernel: Some(cr3), ..LIVE });
        for find in [LIVE, by_cr3, named] {
            assert_eq!(Kernel::find(&guest, find).unwrap().symbol("_stext").unwrap(), place.gva);
        }
    }
    let error = Kernel::find(&guest, Find { kernel: Some(0xb0_0000), ..LIVE }).unwrap_err();
    assert!(matches!(error, FindError::NotInSpace { cr3: 0xb0_0000 }), "{error}");
}

#[test]
fn of_several_kernels_the_one_whose_system_calls_begin_at_lstar_is_right() {
    let guest = Guest::default();
    for place in [Place::FIRST, Place::SECOND] {
        let entry = ('T', "entry_SYSCALL_64".to_owned(), place.gva + 0x80);
        guest.boot_with(&place, &common::btf::kernel(), vec![entry]);
    }
    for place in [Place::FIRST, Place::SECOND] {
        let find = Find { lstar: Some(place.gva + 0x80), ..Find::default() };
        assert_eq!(Kernel::find(&guest, find).unwrap().symbol("_stext").unwrap(), place.gva);
    }
    let found = Kernel::find(&guest, Find { lstar: Some(0x80), ..Find::default() });
    assert!(matches!(found, Err(FindError::Ambiguous { .. })));
}

#[test]
fn a_note_begins_at_a_page() {
    let guest = Guest::with(&[Place::FIRST]);
    let note = guest.bytes(Place::FIRST.note, 0x800);
    guest.put(Place::FIRST.note, &[0; 0x800]);
    guest.put(Place::FIRST.note + 0x800, &note);
    assert_eq!(Kernel::find(&guest, LIVE).unwrap().note().gpa, None);
}

#[test]
fn what_is_no_linux_is_said_to_be_none() {
    let guest = Guest::default();
    for find in [Find::default(), LIVE] {
        assert!(matches!(Kernel::find(&guest, find), Err(FindError::NoKernel)));
    }
    guest.boot(&Place::FIRST);
    guest.put(Place::FIRST.gpa + PAGE_TABLES, &[0; 0x1000]);
    let error = Kernel::find(&guest, LIVE).unwrap_err();
    assert!(matches!(error, FindError::NoneFits { count: 1 }));
    assert!(error.to_string().contains(
        "the VMCOREINFO note in the guest's memory does not fit its page tables, nor do"
    ));
}

#[test]
fn what_is_not_found_of_a_kernel_is_named() {
    let guest = Guest::with(&[Place::FIRST]);
    let identity = Identity::of(&kernel(&guest)).unwrap();
    assert_eq!(
        (identity.release.as_str(), identity.command_line, identity.booted),
        (RELEASE, None, None)
    );
    let missing: Vec<_> = identity.missing.iter().map(|missing| missing.what).collect();
    assert_eq!(missing, ["the command line", "the boot time"]);
    assert!(
        identity.missing[0].why.contains("no symbol saved_command_line"),
        "{:?}",
        identity.missing
    );
}

#[test]
fn a_kernel_whose_memory_another_one_has_taken_is_no_more() {
    let guest = Guest::with(&[Place::FIRST]);
    let kernel = kernel(&guest);
    kernel.symbols().unwrap();
    assert!(kernel.is_in_memory().unwrap());
    // Another one beside it takes nothing from it.
    guest.boot(&Place::SECOND);
    assert!(kernel.is_in_memory().unwrap());
    let whole = guest.bytes(0, common::RAM);
    for (gpa, len) in [
        (Place::FIRST.note, 0x1000),
        (Place::FIRST.gpa + PAGE_TABLES, 0x1000),
        (Place::FIRST.gpa + UTS, 0x1000),
    ] {
        guest.put(gpa, &vec![0; len]);
        assert!(!kernel.is_in_memory().unwrap(), "{gpa:#x}");
        guest.put(0, &whole);
        assert!(kernel.is_in_memory().unwrap());
    }
}

#[test]
fn a_kernel_without_types_or_symbols_says_so() {
    let guest = Guest::with(&[Place::FIRST]);
    guest.put(Place::FIRST.gpa + BTF, &[0; 64]);
    let with_symbols = kernel(&guest);
    with_symbols.symbols().unwrap();
    assert!(matches!(with_symbols.types(), Err(KernelError::Types(_))));
    assert!(matches!(with_symbols.symbol("no"), Err(KernelError::NoSymbol { .. })));
    guest.put(Place::FIRST.gpa + KALLSYMS, &[0; 0x4_0000]);
    assert!(matches!(kernel(&guest).types(), Err(KernelError::Symbols(_))));
}

#[test]
fn a_list_that_does_not_end_is_an_error() {
    let guest = Guest::with(&[Place::FIRST]);
    let kernel = kernel(&guest);
    let Place { gpa, gva, .. } = Place::FIRST;
    // The last task's next one is the second.
    guest.put_word(gpa + TASKS + 3 * 64, gva + TASKS + 64);
    let nodes: Vec<_> = kernel.list(gva + TASKS).take(1000).collect();
    assert!(nodes.len() < 20, "{}", nodes.len());
    assert!(matches!(nodes.last(), Some(Err(KernelError::Endless { .. }))));
    // Itself.
    guest.put_word(gpa + TASKS + 64, gva + TASKS + 64);
    assert!(matches!(kernel.list(gva + TASKS).last(), Some(Err(KernelError::Endless { .. }))));
    // Nowhere.
    guest.put_word(gpa + TASKS + 64, 0x1234_5678);
    assert!(matches!(
        kernel.list(gva + TASKS).last(),
        Some(Err(KernelError::Read { gva: 0x1234_5678, .. }))
    ));
    // An invalid pointer, which is not an end.
    for end in [0, 0x35] {
        guest.put_word(gpa + TASKS + 64, end);
        let last = kernel.list(gva + TASKS).last();
        assert!(
            matches!(last, Some(Err(KernelError::Broken { next, .. })) if next == end),
            "{last:?}"
        );
    }
}

#[test]
fn texts_end_at_their_end() {
    let guest = Guest::with(&[Place::FIRST]);
    let kernel = kernel(&guest);
    let Place { gpa, gva, .. } = Place::FIRST;
    let end = common::IMAGE - 5;
    guest.put(gpa + end, b"last\0");
    assert_eq!(kernel.read_cstr(gva + end, 4096).unwrap(), b"last");
    assert_eq!(kernel.read_cstr(gva + end, 3).unwrap(), b"las");
    guest.put(gpa + end, b"last!");
    let error = kernel.read_cstr(gva + end, 4096).unwrap_err();
    assert!(
        matches!(&error, KernelError::Read { gva: at, .. } if *at == gva + common::IMAGE),
        "{error}"
    );
    assert!(!error.is_final());
    let long = vec![b'x'; 3000];
    guest.put(gpa + 0x30_0001, &long);
    assert_eq!(kernel.read_cstr(gva + 0x30_0001, 4096).unwrap(), long);
    assert_eq!(guest.ranges().unwrap().len(), 1);
}

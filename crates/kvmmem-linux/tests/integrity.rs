// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernels that a builder wrote and a rootkit has changed.

mod common;

use common::objects::{
    self, CALLS, DISPATCHER, IDT, KOBJECT, LIST, NODES, TASK_LIST, at, module, task,
};
use common::{Guest, Place};
use kvmmem_linux::integrity::{self, Check, Finding, Place as At};
use kvmmem_linux::{Find, Kernel, KernelError};
use proptest::prelude::*;

const PLACE: Place = Place::FIRST;

/// Code of a module.
const MODULE: u64 = 0xffff_ffff_c000_1010;

fn kernel(guest: &Guest) -> Kernel<'_> {
    Kernel::find(guest, Find { note: Some(PLACE.note), ..Find::default() }).unwrap()
}

fn gva(object: u64) -> u64 {
    PLACE.gva + objects::OBJECTS + object
}

/// What all checks find.
fn findings(guest: &Guest) -> Vec<Finding> {
    let kernel = kernel(guest);
    Check::ALL.into_iter().flat_map(|check| check.run(&kernel).unwrap().findings).collect()
}

fn hook(entry: &str, gva: u64, target: u64, place: At) -> Finding {
    Finding::Hook { entry: entry.to_owned(), gva: Some(gva), target, place }
}

fn hidden(name: &str, object: u64, found: &'static str, missing: &'static str) -> Finding {
    Finding::Hidden { name: name.to_owned(), gva: gva(object), found, missing }
}

/// Takes a list's node out of it.
fn unlink(guest: &Guest, node: u64) {
    let link =
        |object: u64| u64::from_le_bytes(guest.bytes(at(&PLACE, object), 8).try_into().unwrap());
    let (next, previous) = (link(node), link(node + 8));
    let place = |gva: u64| gva - PLACE.gva + PLACE.gpa;
    guest.put_word(place(previous), next);
    guest.put_word(place(next) + 8, previous);
}

#[test]
fn of_a_sound_kernel_everything_is_examined_and_nothing_found() {
    let guest = objects::guest(&PLACE);
    let kernel = kernel(&guest);
    let examined = Check::ALL.map(|check| {
        assert!(check.applies(&kernel));
        let report = check.run(&kernel).unwrap();
        assert_eq!(report.findings, [], "{check:?}");
        report.examined
    });
    assert_eq!(examined, [5, 3, 47, 3, 4]);
}

#[test]
fn entries_that_lead_out_of_the_text_are_hooks() {
    let in_module = || At::Module("two".to_owned());
    let guest = objects::guest(&PLACE);
    guest.put_word(at(&PLACE, CALLS + 8 * 2), MODULE);
    assert_eq!(findings(&guest), [hook("system call 2", gva(CALLS + 16), MODULE, in_module())]);

    // Of a module that hides as well, another part of whose neighbour lies after it.
    unlink(&guest, module(1) + LIST);
    guest.put_word(at(&PLACE, module(0) + 0xb0), 0xffff_ffff_c000_8000);
    guest.put(at(&PLACE, module(0) + 0xb8), &0x8000u32.to_le_bytes());
    assert_eq!(findings(&guest)[0], hook("system call 2", gva(CALLS + 16), MODULE, in_module()));

    // Nor may it lead into the middle of a function.
    let guest = objects::guest(&PLACE);
    guest.put_word(at(&PLACE, CALLS), PLACE.gva + 0x1008);
    let place = At::Text { symbol: "filler_0".to_owned(), offset: 8 };
    assert_eq!(findings(&guest), [hook("system call 0", gva(CALLS), PLACE.gva + 0x1008, place)]);

    let guest = objects::guest(&PLACE);
    guest.put_word(at(&PLACE, IDT + 16 * 14 + 8), 0xffff_c900);
    let [finding] = &findings(&guest)[..] else { panic!("{:?}", findings(&guest)) };
    assert!(
        matches!(finding, Finding::Hook { entry, place: At::Elsewhere, .. } if entry == "interrupt vector 14")
    );

    // The early handler of another exception.
    let guest = objects::guest(&PLACE);
    guest.put(at(&PLACE, IDT + 16 * 29), &guest.bytes(at(&PLACE, IDT + 16 * 30), 16));
    assert_eq!(findings(&guest).len(), 1);

    // The call of the second handler.
    let guest = objects::guest(&PLACE);
    let call = PLACE.gva + DISPATCHER + 9 + 3;
    let distance = u32::try_from(MODULE.wrapping_sub(call + 5) & 0xffff_ffff).unwrap();
    guest.put(PLACE.gpa + DISPATCHER + 13, &distance.to_le_bytes());
    assert_eq!(
        findings(&guest),
        [hook("branch of x64_sys_call at +0xc", call, MODULE, in_module())]
    );
}

/// The begin of another function of the kernel is not the handler of a system call or of an
/// interrupt, nor is one that another entry has.
#[test]
fn entries_that_lead_to_another_function_are_hooks() {
    let function = |name: &str| At::Text { symbol: name.to_owned(), offset: 0 };
    let other = PLACE.gva + 0x1000 + 16 * 100;
    let guest = objects::guest(&PLACE);
    guest.put_word(at(&PLACE, CALLS + 8), other);
    assert_eq!(
        findings(&guest),
        [hook("system call 1", gva(CALLS + 8), other, function("filler_100"))]
    );
    // The handler of call 1, for a call with a known name and for one without.
    let handler = |number: u64| PLACE.gva + 0x1000 + 16 * number;
    for (number, entry) in [(3, "system call 3"), (4, "system call 4 as well as 1")] {
        let guest = objects::guest(&PLACE);
        guest.put_word(at(&PLACE, CALLS + 8 * number), handler(1));
        let expected = hook(entry, gva(CALLS + 8 * number), handler(1), function("filler_1"));
        assert_eq!(findings(&guest), [expected]);
    }
    // Two that are exchanged, and one that is led to where calls are that the kernel lacks.
    let guest = objects::guest(&PLACE);
    guest.put_word(at(&PLACE, CALLS), handler(1));
    guest.put_word(at(&PLACE, CALLS + 8), handler(0));
    let expected = [
        hook("system call 0", gva(CALLS), handler(1), function("filler_1")),
        hook("system call 1", gva(CALLS + 8), handler(0), function("filler_0")),
    ];
    assert_eq!(findings(&guest), expected);
    let guest = objects::guest(&PLACE);
    guest.put_word(at(&PLACE, CALLS + 16), handler(99));
    let expected = hook("system call 2", gva(CALLS + 16), handler(99), function("filler_99"));
    assert_eq!(findings(&guest), [expected]);
    guest.put_word(at(&PLACE, CALLS + 16), handler(2));
    // The kernel lacks this one.
    guest.put_word(at(&PLACE, CALLS + 32), handler(99));
    assert_eq!(findings(&guest), []);

    let gate = |guest: &Guest, vector: u64, target: u64| {
        let bytes = (PLACE.gva + target).to_le_bytes();
        guest.put(at(&PLACE, IDT + 16 * vector), &bytes[..2]);
        guest.put(at(&PLACE, IDT + 16 * vector + 6), &bytes[2..]);
    };
    // Of an exception, of a device, and the same two with a handler that another vector has.
    for (vector, target, entry, symbol) in [
        (13, 0x1000 + 16 * 100, "interrupt vector 13", "filler_100"),
        (40, 0x1000 + 16 * 100, "interrupt vector 40", "filler_100"),
        (14, 0x1000 + 16 * 13, "interrupt vector 14 as well as 13", "filler_13"),
        (41, 0xc000 + 8 * 40, "interrupt vector 41 as well as 40", "irq_entries_start"),
    ] {
        let guest = objects::guest(&PLACE);
        gate(&guest, vector, target);
        let [Finding::Hook { entry: found, target: to, place: At::Text { symbol: at, .. }, .. }] =
            &findings(&guest)[..]
        else {
            panic!("{vector}: {:?}", findings(&guest))
        };
        assert_eq!((found.as_str(), *to, at.as_str()), (entry, PLACE.gva + target, symbol));
    }
    // An exception does not lead to a stub.
    let guest = objects::guest(&PLACE);
    gate(&guest, 13, 0xc000 + 8 * 200);
    assert_eq!(findings(&guest).len(), 1);
}

#[test]
fn where_a_vcpu_enters_the_kernel_is_checked() {
    let guest = objects::guest(&PLACE);
    let kernel = kernel(&guest);
    let of = |values: &[u64]| {
        let names = ["first", "second", "third"].map(str::to_owned);
        let values: Vec<_> = names.into_iter().zip(values.iter().copied()).collect();
        let report = integrity::check_lstar(&kernel, &values).unwrap();
        (report.examined, report.findings)
    };
    let entry = PLACE.gva + 0xe000;
    assert_eq!(of(&[entry; 2]), (2, vec![]));
    let mut found = hook("second", 0, MODULE, At::Module("two".to_owned()));
    // A register has no address.
    if let Finding::Hook { gva, .. } = &mut found {
        *gva = None;
    }
    assert_eq!(of(&[entry, MODULE, entry]), (3, vec![found]));
}

#[test]
fn what_is_only_in_one_of_two_places_is_hidden() {
    let (listed, sysfs) = ("the list of modules", "/sys/module");
    let guest = objects::guest(&PLACE);
    unlink(&guest, module(1) + LIST);
    assert_eq!(findings(&guest), [hidden("module two", module(1), sysfs, listed)]);
    let guest = objects::guest(&PLACE);
    unlink(&guest, KOBJECT + 0x40 * 2);
    assert_eq!(findings(&guest), [hidden("module three", module(2), listed, sysfs)]);

    let (lists, pids) = ("the lists of tasks", "the table of pids");
    let guest = objects::guest(&PLACE);
    unlink(&guest, task(2) + TASK_LIST);
    assert_eq!(findings(&guest), [hidden("process 70 (task-70)", task(2), pids, lists)]);
    let guest = objects::guest(&PLACE);
    unlink(&guest, task(4) + 56);
    assert_eq!(
        findings(&guest),
        [hidden("thread 4001 of process 4000 (task-4001)", task(4), pids, lists)]
    );
    // Slot 6 of the second leaf.
    let guest = objects::guest(&PLACE);
    guest.put_word(at(&PLACE, NODES + 0x800 + 8 + 8 * 6), 0);
    assert_eq!(findings(&guest), [hidden("process 70 (task-70)", task(2), lists, pids)]);
}

#[test]
fn a_damaged_tree_of_pids_is_an_error() {
    let tasks = |guest: &Guest| Check::Tasks.run(&kernel(guest));
    // A node below itself, an invalid level, a node below the lowest.
    for (object, word) in [
        (NODES + 8, gva(NODES) | 2),
        (NODES, 7),
        (NODES + 0x400 + 8, gva(NODES) | 2),
        (NODES + 16, 5),
    ] {
        let guest = objects::guest(&PLACE);
        guest.put_word(at(&PLACE, object), word);
        let error = tasks(&guest).unwrap_err();
        assert!(matches!(error, KernelError::Malformed { .. }), "{object:#x}: {error:?}");
    }
    // What the kernel uses for itself is passed over.
    let guest = objects::guest(&PLACE);
    guest.put_word(at(&PLACE, NODES + 0x400 + 8), 257 << 2 | 2);
    assert_eq!(tasks(&guest).unwrap().findings, []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_byte_does_harm(
        changes in proptest::collection::vec(
            (
                prop_oneof![CALLS..CALLS + 0x40, IDT..IDT + 0x300, module(0)..module(3), KOBJECT..KOBJECT + 0x100,
                    task(0)..task(5), 0x9000u64..0x9a80, NODES..NODES + 0xe10],
                prop_oneof![Just(0u64), Just(u64::MAX), any::<u64>(), 0u64..0x4000, (0u64..0xc000).prop_map(gva),
                    (0u64..0xc000).prop_map(|object| gva(object & !0xff) | 2)],
                1usize..9,
            ),
            1..12,
        ),
        code in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let guest = objects::guest(&PLACE);
        for (object, value, len) in changes {
            guest.put(at(&PLACE, object), &value.to_le_bytes()[..len]);
        }
        guest.put(PLACE.gpa + DISPATCHER, &code);
        let kernel = kernel(&guest);
        for check in Check::ALL {
            let _ = check.run(&kernel);
        }
    }
}

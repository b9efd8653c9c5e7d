// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A kernel in a guest's memory with any bytes in place of some: its note, page tables, symbols,
//! types and lists. The first byte chooses a layout; the others are pieces: where each lies, how
//! long it is, and what is in it.
#![no_main]

#[path = "../../crates/kvmmem-linux/tests/common/mod.rs"]
mod common;

use std::sync::OnceLock;

use common::{BTF, Guest, KALLSYMS, Layout, PAGE_TABLES, Place, TASKS};
use kvmmem_linux::identity::Identity;
use kvmmem_linux::{Find, Kernel, KernelError, log};
use libfuzzer_sys::fuzz_target;

const LAYOUTS: [Layout; 4] =
    [Layout::BeforeNames, Layout::AfterIndex, Layout::Unsigned, Layout::FromPlace];

fuzz_target!(|bytes: &[u8]| {
    static GUESTS: OnceLock<Vec<(Place, Guest)>> = OnceLock::new();
    let guests = GUESTS.get_or_init(|| {
        let places = LAYOUTS.map(|layout| Place {
            layout,
            five_levels: layout == Layout::Unsigned,
            ..Place::FIRST
        });
        places.map(|place| (place, Guest::with(&[place]))).into()
    });
    let Some((choice, mut rest)) = bytes.split_first() else { return };
    let (place, guest) = &guests[usize::from(*choice) % guests.len()];
    let mut old = Vec::new();
    while let Some(([part, low, high, len], tail)) = rest.split_first_chunk::<4>() {
        let (piece, tail) = tail.split_at(tail.len().min(usize::from(*len)));
        rest = tail;
        let parts = [
            place.note,
            place.gpa + PAGE_TABLES,
            place.gpa + KALLSYMS,
            place.gpa + BTF,
            place.gpa + TASKS,
        ];
        let at =
            parts[usize::from(*part) % parts.len()] + u64::from(u16::from_le_bytes([*low, *high]));
        old.push((at, guest.bytes(at, piece.len())));
        guest.put(at, piece);
    }
    // By its note, and by its page tables.
    let by_note = Find { note: Some(place.note), ..Find::default() };
    let by_tables = Find { kernel: Some(place.gpa + PAGE_TABLES), ..Find::default() };
    for find in [by_note, by_tables] {
        if let Ok(kernel) = Kernel::find(guest, find) {
            let _ = (walk(&kernel), Identity::of(&kernel));
            let _ = log::records(&kernel).map(|records| records.take(1000).count());
        }
    }
    // The next run begins with the same kernel.
    old.iter().rev().for_each(|(at, bytes)| guest.put(*at, bytes));
});

fn walk(kernel: &Kernel<'_>) -> Result<(), KernelError> {
    assert!(kernel.symbols()?.iter().count() <= kernel.symbols()?.len());
    let head = kernel.symbol("init_task")?;
    for task in kernel.list_of(head, "task_struct", "tasks")?.take(1000) {
        let task = kernel.object("task_struct", task?)?;
        let _ =
            (task.get("pid"), task.get_signed("flags.high"), task.text("comm").map(<[u8]>::len));
        let _ = kernel.read_cstr(task.gva(), 64);
    }
    Ok(())
}

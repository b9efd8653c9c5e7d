// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A process whose memory areas, and the list or maple tree that has them, hold any bytes in place
//! of some. The first byte chooses between the two, the others are pieces: where each lies, how
//! long it is, and what is in it.
#![no_main]

#[path = "../../crates/kvmmem-linux/tests/common/mod.rs"]
mod common;

use std::sync::OnceLock;

use common::areas::{AREAS, MM, NODES, area, task};
use common::{BTF, Guest, Place, btf};
use kvmmem_linux::maps::Maps;
use kvmmem_linux::{Find, Kernel};
use libfuzzer_sys::fuzz_target;

const PLACE: Place = Place::FIRST;

fuzz_target!(|bytes: &[u8]| {
    static GUESTS: OnceLock<[Guest; 2]> = OnceLock::new();
    let guests = GUESTS.get_or_init(|| {
        [true, false].map(|in_tree| {
            let guest = Guest::with(&[PLACE]);
            let ranges: Vec<_> =
                (1..200).map(|index| (index << 14, (index << 14) + 0x2000)).collect();
            guest.areas(&PLACE, &ranges, 6);
            if !in_tree {
                guest.put(PLACE.gpa + BTF, &btf::with_areas(false));
                guest.first_of_list(&PLACE, area(&PLACE, 0));
            }
            guest
        })
    });
    let Some((choice, mut rest)) = bytes.split_first() else { return };
    let guest = &guests[usize::from(*choice) % guests.len()];
    let mut old = Vec::new();
    while let Some(([part, low, high, len], tail)) = rest.split_first_chunk::<4>() {
        let (piece, tail) = tail.split_at(tail.len().min(usize::from(*len)));
        rest = tail;
        let at = [MM, AREAS, NODES][usize::from(*part) % 3]
            + u64::from(u16::from_le_bytes([*low, *high]));
        old.push((PLACE.gpa + at, guest.bytes(PLACE.gpa + at, piece.len())));
        guest.put(PLACE.gpa + at, piece);
    }
    let kernel = Kernel::find(guest, Find { note: Some(PLACE.note), ..Find::default() });
    let map = kernel.ok().and_then(|kernel| Maps::new(&kernel).ok()?.of(&task(&PLACE)).ok());
    if let Some(map) = map {
        assert!(map.mappings.is_sorted_by(|one, two| one.end <= two.start));
    }
    // The next run begins with the same process.
    old.iter().rev().for_each(|(at, bytes)| guest.put(*at, bytes));
});

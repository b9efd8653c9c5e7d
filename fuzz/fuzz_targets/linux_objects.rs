// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A kernel's sockets, system calls, interrupts, modules and pids with any bytes in place of some.
//! The input is pieces: where each lies, how long it is, and what is in it.
#![no_main]

#[path = "../../crates/kvmmem-linux/tests/common/mod.rs"]
mod common;

use std::sync::OnceLock;

use common::objects::{self, DISPATCHER, LEN, OBJECTS};
use common::{Guest, Place};
use kvmmem_linux::integrity::Check;
use kvmmem_linux::sockets::Sockets;
use kvmmem_linux::{Find, Kernel};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    static GUEST: OnceLock<Guest> = OnceLock::new();
    let place = Place::FIRST;
    let guest = GUEST.get_or_init(|| objects::guest(&place));
    let (mut rest, mut old) = (bytes, Vec::new());
    while let Some(([part, low, high, len], tail)) = rest.split_first_chunk::<4>() {
        let (piece, tail) = tail.split_at(tail.len().min(usize::from(*len)));
        rest = tail;
        let offset = u64::from(u16::from_le_bytes([*low, *high]));
        let at = place.gpa
            + if part % 8 == 0 { DISPATCHER + offset % 0x40 } else { OBJECTS + offset % LEN };
        old.push((at, guest.bytes(at, piece.len())));
        guest.put(at, piece);
    }
    if let Ok(kernel) = Kernel::find(guest, Find { note: Some(place.note), ..Find::default() }) {
        let _ = Sockets::new(&kernel).map(|sockets| sockets.filter(Result::is_ok).count());
        for check in Check::ALL {
            let _ = check.run(&kernel);
        }
    }
    // The next run begins with the same kernel.
    old.iter().rev().for_each(|(at, bytes)| guest.put(*at, bytes));
});

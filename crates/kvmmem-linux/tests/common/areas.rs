// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes the memory areas of a process, in a list or in a maple tree.

use std::time::Duration;

use kvmmem_linux::tasks::Task;

use super::{Guest, Place};

/// What the process has, in bytes from the begin of the kernel's image.
pub(crate) const MM: u64 = 0x20_0000;
pub(crate) const PROCESS: u64 = 0x20_0100;
pub(crate) const AREAS: u64 = 0x20_1000;
pub(crate) const NODES: u64 = 0x30_0000;

/// Bytes of an area, and of a node.
pub(crate) const AREA: u64 = 72;
pub(crate) const NODE: u64 = 256;
const EMPTY: [u8; 256] = [0; 256];

/// Slots of the nodes with and without areas.
const LEAF: usize = 16;
const INNER: usize = 10;

/// Slots, each with the last number that it has.
type Slots = Vec<(u64, u64)>;

/// The process.
pub(crate) fn task(place: &Place) -> Task {
    Task {
        gva: place.gva + PROCESS,
        tid: 7,
        pid: 7,
        ppid: Some(1),
        uid: Some(0),
        euid: Some(0),
        gid: Some(0),
        state: 'S',
        start: Some(Duration::ZERO),
        comm: "areas".to_owned(),
        is_kernel: false,
        args: Default::default(),
        is_torn: false,
        is_damaged: false,
    }
}

/// Address of an area.
pub(crate) fn area(place: &Place, index: usize) -> u64 {
    place.gva + AREAS + AREA * index as u64
}

impl Guest {
    /// Writes a process with these areas, which ascend, in a list and in a tree whose nodes have at
    /// most `slots` slots in use.
    pub(crate) fn areas(&self, place: &Place, ranges: &[(u64, u64)], slots: usize) {
        let mm = place.gva + MM;
        self.put_word(place.gpa + PROCESS + 56, mm);
        self.put(place.gpa + MM + 16, &u32::try_from(ranges.len()).unwrap().to_le_bytes());
        for (index, (start, end)) in ranges.iter().enumerate() {
            let next = if index + 1 < ranges.len() { area(place, index + 1) } else { 0 };
            let words = [*start, *end, mm, 0x73, 0, 0, 0, 0, next];
            let at = place.gpa + AREAS + AREA * index as u64;
            self.put(at, &words.map(u64::to_le_bytes).concat());
        }
        let root = self.tree(place, ranges, slots);
        self.put_word(place.gpa + MM + 8, root);
    }

    /// The list's head is where the tree's lock is.
    pub(crate) fn first_of_list(&self, place: &Place, gva: u64) {
        self.put_word(place.gpa + MM, gva);
    }

    fn tree(&self, place: &Place, ranges: &[(u64, u64)], slots: usize) -> u64 {
        let mut level = Slots::new();
        let mut low = 0;
        for (index, (start, end)) in ranges.iter().enumerate() {
            if *start > low {
                level.push((0, start - 1));
            }
            level.push((area(place, index), end - 1));
            low = *end;
        }
        level.push((0, u64::MAX));
        let (mut nodes, mut kind, mut most) = (0, 1, slots.min(LEAF));
        loop {
            let is_root = level.len() <= most;
            level = level
                .chunks(most)
                .map(|slots| {
                    let at = NODES + NODE * nodes;
                    self.node(place.gpa + at, kind, slots);
                    nodes += 1;
                    // A pointer to a node has its kind, and one to the root another bit.
                    let bits = kind << 3 | if is_root { 2 } else { 6 };
                    ((place.gva + at) | bits, slots.last().unwrap().1)
                })
                .collect();
            if is_root {
                return level[0].0;
            }
            (kind, most) = (3, slots.clamp(2, INNER));
        }
    }

    /// A node, as the kernel leaves it: pivots after the last one in use are 0, and then its number
    /// is in the metadata.
    pub(crate) fn node(&self, gpa: u64, kind: u64, slots: &[(u64, u64)]) {
        let (room, slots_at, end_at) = if kind == 3 { (INNER, 80, 240) } else { (LEAF, 128, 248) };
        self.put(gpa, &EMPTY);
        for (index, (slot, last)) in slots.iter().enumerate() {
            let index = index as u64;
            if index + 1 < room as u64 {
                self.put_word(gpa + 8 + 8 * index, *last);
            }
            self.put_word(gpa + slots_at + 8 * index, *slot);
        }
        if slots.len() < room - 1 {
            self.put(gpa + end_at, &[u8::try_from(slots.len() - 1).unwrap()]);
        }
    }
}

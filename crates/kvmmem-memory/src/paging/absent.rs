// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What entries mean to the operating system whose present bit is clear, so that the processor
//! ignores the rest of them.
//!
//! Linux: `arch/x86/include/asm/pgtable-invert.h`, `_PAGE_PROTNONE` in `pgtable_types.h`, swap
//! entries in `pgtable_64.h`. Windows: `_MMPTE_TRANSITION`. Neither writes its name on the entry:
//! the meaning is a guess from the bits.

use std::fmt;

use super::entry::{ADDRESS, Entry, PRESENT};

/// Linux: bit 8 of an entry that is not present. Its frame is inverted (since 2018, against L1TF).
const PROT_NONE: u64 = 1 << 8;
/// Linux: set in an inverted frame, clear in a frame that is not, as RAM ends below bit 51.
const INVERTED: u64 = 1 << 51;
/// Windows: the entry belongs to a prototype, and has no frame.
const PROTOTYPE: u64 = 1 << 10;
/// Windows: the page is in memory, on a list of pages that can be used for something else.
const TRANSITION: u64 = 1 << 11;
/// Windows: the frame of an entry in transition.
const TRANSITION_ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// What an entry that is not present says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// Nothing is known of it: nothing is mapped, or the page is not in memory.
    Unknown,
    /// Linux: the page is in memory, and no access is allowed (PROT_NONE) or the next one shall
    /// fault (NUMA balancing).
    ProtNone {
        /// Where the looked-up address lies.
        gpa: u64,
    },
    /// Windows: the page is in memory, on the standby or the modified list.
    Transition {
        /// Where the looked-up address lies, or, where the entry is not a PTE, the table that
        /// comes next.
        gpa: u64,
    },
}

impl Entry {
    /// What the entry says if it is not present; `gva` is the address that was looked up.
    pub fn absent(&self, gva: u64) -> Option<Absent> {
        if self.value & PRESENT != 0 {
            return None;
        }
        let offset = gva & (self.span() - 1);
        Some(if self.value & PROT_NONE != 0 && self.value & INVERTED != 0 && self.is_leaf() {
            let frame = !self.value & ADDRESS & !(self.span() - 1);
            Absent::ProtNone { gpa: frame | offset }
        } else if self.value & TRANSITION != 0 && self.value & (PROTOTYPE | INVERTED) == 0 {
            let frame = self.value & TRANSITION_ADDRESS;
            Absent::Transition { gpa: if self.level == 1 { frame | offset } else { frame } }
        } else {
            Absent::Unknown
        })
    }
}

/// What follows "the entry is not present".
impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => Ok(()),
            Self::ProtNone { gpa } => {
                write!(
                    f,
                    "; in Linux it means PROT_NONE or NUMA balancing, with the page in memory at gpa {gpa:#x}"
                )
            }
            Self::Transition { gpa } => {
                write!(f, "; in Windows it means a page in transition, in memory at gpa {gpa:#x}")
            }
        }
    }
}

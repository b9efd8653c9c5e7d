// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An entry of a page table.

use std::fmt;

/// Bits 12 to 51 of an entry: where the next table or the page is.
pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

pub(super) const PRESENT: u64 = 1 << 0;
pub(super) const WRITABLE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
/// Where a table might follow: this entry maps a large page instead.
pub(super) const LARGE: u64 = 1 << 7;
pub(super) const NO_EXECUTE: u64 = 1 << 63;

/// One entry that a walk has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// 5 is PML5E, 4 PML4E, 3 PDPTE, 2 PDE, 1 PTE.
    pub level: u8,
    /// Where the entry lies.
    pub gpa: u64,
    /// What it holds.
    pub value: u64,
}

impl Entry {
    /// The entry's name in the manuals.
    pub fn name(&self) -> &'static str {
        match self.level {
            1 => "PTE",
            2 => "PDE",
            3 => "PDPTE",
            4 => "PML4E",
            _ => "PML5E",
        }
    }

    /// Whether the entry maps a page, if it is present.
    pub fn is_leaf(&self) -> bool {
        self.level == 1 || self.value & LARGE != 0 && matches!(self.level, 2 | 3)
    }

    /// Bytes that the entry spans.
    pub(super) fn span(&self) -> u64 {
        1 << (12 + 9 * (u32::from(self.level) - 1))
    }

    /// Bits that must be 0. Those above the vCPU's physical address width must be as well, but
    /// which these are is not known here.
    pub(super) fn reserved_bits(&self) -> u64 {
        match self.level {
            1 => 0,
            // Bit 12 of a large page is PAT.
            2 | 3 if self.is_leaf() => ((1 << (12 + 9 * (self.level - 1))) - 1) & !0x1fff,
            2 | 3 => 0,
            _ => LARGE,
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x} at gpa {:#x}", self.name(), self.value, self.gpa)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Low memory of a machine at its start, by GPA.
//!
//! | from | what |
//! |---|---|
//! | 0x500 | GDT |
//! | 0x7000 | boot parameters (zero page) |
//! | 0x8ff0 | the boot CPU's stack, growing down |
//! | 0x9000 | page tables: 6 pages |
//! | 0x10000 | seed for the guest's random numbers |
//! | 0x20000 | kernel command line |
//! | 0x9fc00 | end of usable low memory |
//! | 0xe0000 | ACPI tables |
//! | 0xffff0 | reset vector |
//! | 0x100000 | kernel |

use vm_memory::GuestAddress;

pub(super) const GDT: GuestAddress = GuestAddress(0x500);
pub(super) const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Where the boot CPU's stack starts, growing down.
pub(crate) const STACK_TOP: u64 = 0x8ff0;
pub(super) const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
pub(super) const SEED: GuestAddress = GuestAddress(0x1_0000);
pub(super) const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
pub(super) const LOW_MEMORY_END: u64 = 0x9_fc00;
pub(super) const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// `f000:fff0` in real mode.
pub(super) const RESET_VECTOR: u64 = 0xf_fff0;
/// End of what the memory map reserves for the tables and the reset vector.
pub(super) const FIRMWARE_END: u64 = 0x10_0000;
pub(super) const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// The least RAM a machine can have: what the table above takes, and a little kernel.
pub(crate) const MIN_RAM: u64 = 2 << 20;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Initial contents of RAM and registers, written at start and after each reset: the kernel, its
//! parameters ([`params`]), page tables ([`paging`]), firmware tables ([`acpi`]) and the reset
//! vector ([`reset`]).
//!
//! Low memory, by GPA:
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

mod acpi;
mod loader;
mod paging;
mod params;
mod reset;
mod seed;

pub use acpi::AcpiError;
pub(crate) use acpi::{AcpiDevice, write_tables};
pub use loader::LoadError;
pub(crate) use loader::load;
pub(crate) use paging::{boot_sregs, write_page_tables};
pub(crate) use params::write_params;
pub(crate) use reset::write_reset_vector;
pub(crate) use seed::write_seed;

use vm_memory::GuestAddress;

const GDT: GuestAddress = GuestAddress(0x500);
const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Where the boot CPU's stack starts, growing down.
pub(crate) const STACK_TOP: u64 = 0x8ff0;
const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
const SEED: GuestAddress = GuestAddress(0x1_0000);
const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
const LOW_MEMORY_END: u64 = 0x9_fc00;
const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// `f000:fff0` in real mode.
const RESET_VECTOR: u64 = 0xf_fff0;
/// End of what the memory map reserves for the tables and the reset vector.
const FIRMWARE_END: u64 = 0x10_0000;
const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// The least RAM a machine can have: what the table above takes, and a little kernel.
pub(crate) const MIN_RAM: u64 = 2 << 20;

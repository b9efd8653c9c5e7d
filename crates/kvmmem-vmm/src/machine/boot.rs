// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Initial contents of RAM and registers, written at start and after each reset: the kernel, its
//! parameters ([`params`]), page tables ([`paging`]), firmware tables ([`acpi`]) and the reset
//! vector ([`reset`]). [`layout`] says what is where.

mod acpi;
mod layout;
mod loader;
mod paging;
mod params;
mod reset;
mod seed;

pub use acpi::AcpiError;
pub(crate) use acpi::{AcpiDevice, write_tables};
pub(crate) use layout::{MIN_RAM, STACK_TOP};
pub use loader::LoadError;
pub(crate) use loader::load;
pub(crate) use paging::{boot_sregs, write_page_tables};
pub(crate) use params::write_params;
pub(crate) use reset::write_reset_vector;
pub(crate) use seed::write_seed;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtual address space of the guest, the kernel's or a process's, with page tables that are
//! read once.
//!
//! Page tables are kept: each is read whole, the first time an address leads through it. The guest
//! changes them while it runs, so what they do not map is looked up again in memory, and
//! [`Space::forget`] drops them all.

mod guest_space;
mod mapped;

pub use guest_space::{Space, SpaceError};
pub use mapped::{Extent, MappedError};

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest-physical memory as introspection tools see it.
//!
//! [`Memory`] is the one interface by which everything above reads a target: a view of a running
//! virtual machine (crate `kvmmem`), or a [`DumpFile`] of last week. [`paging`] translates virtual
//! addresses with the target's own page tables.
//!
//! This crate has no transport, so that what is written against it (crate `kvmmem-linux`) runs
//! anywhere. What memory holds is the target's word: nothing here trusts it.
#![deny(unsafe_code)]

pub mod dump;
mod error;
mod memory;
pub mod paging;
pub mod range;

pub use dump::{DumpError, DumpFile};
pub use error::{MemoryError, VectoredError};
pub use memory::Memory;
pub use range::Range;

/// Bytes of the smallest page.
pub const PAGE_SIZE: usize = 4096;

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

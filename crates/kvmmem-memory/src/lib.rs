// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest-physical memory for introspection tools: one trait, page tables, dump files.
//!
//! Analysis code (crate `kvmmem-linux`, the command line) reads a target through [`Memory`]: a view
//! of a running virtual machine (crate `kvmmem`), or a [`DumpFile`]. [`paging`] translates virtual
//! addresses with the target's own page tables.
//!
//! The crate has no transport. The target is untrusted: its memory may hold anything, and no value
//! from it is used unchecked.
#![deny(unsafe_code)]

pub mod dump;
mod error;
mod memory;
pub mod paging;
pub mod range;

pub use dump::{DumpError, DumpFile};
pub use error::{MemoryError, VectoredError};
pub use memory::Memory;
pub use range::{PAGE_SIZE, Range};

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

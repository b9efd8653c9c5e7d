// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A Linux kernel in a guest's memory: its symbols, its types and its own address space, which is
//! all that a reader of its structures needs.

mod chain;
mod describe;
mod direct_map;
pub(crate) mod error;
mod find;
pub(crate) mod guest_kernel;
mod image;
mod list;
mod object;
mod rb_tree;
mod read;
mod walk;

pub use chain::Chain;
pub use error::KernelError;
pub use find::{Candidate, Find, FindError};
pub use guest_kernel::Kernel;
pub use list::{List, MAX_NODES};
pub use object::Object;
pub use walk::{Step, Walk};

// SPDX-License-Identifier: GPL-2.0-only
//! Wrappers of the kernel's C interfaces: the module's only unsafe code, one noun and its invariant
//! a file. They know nothing of views, slots or v1's table: what calls back comes in as a type
//! parameter.
//!
//! `shim.c` has what C offers as macros or inline functions only.

pub(crate) mod area;
pub(crate) mod call;
pub(crate) mod cpu;
pub(crate) mod interrupt;
pub(crate) mod iter;
pub(crate) mod lock;
pub(crate) mod mapping;
pub(crate) mod memory;
pub(crate) mod misc;
pub(crate) mod mmap;
pub(crate) mod notifier;
pub(crate) mod pci;
pub(crate) mod pin;
mod plain;
pub(crate) mod power;
pub(crate) mod published;
pub(crate) mod reopen;
pub(crate) mod secret;
pub(crate) mod task;
pub(crate) mod work;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which pages of a process are replaced by another virtual machine's, and who may give them back.
//!
//! One [`table::Table`] per process (per `mm_struct`) holds a record for each replaced page, keyed
//! by its GVA. A record belongs to one open file and passes through these states:
//!
//! ```text
//!            reserve          commit           begin_undo           finish
//!   (none) ----------> reserved ------> mapped ------------> unmapping ------> (none)
//!                         |                                    |   ^
//!                         | abort                       refuse |   | begin_undo
//!                         v                                    v   |
//!                       (none)                              quarantined
//! ```
//!
//! Only `mapped` and `quarantined` records hold a page; whoever moves a record to `unmapping` takes
//! the page out of it, so no two threads ever hold the same page. [`table`] has the transitions, to
//! be called with the table's lock held; [`ops`] has the sequences that let go of the lock around
//! what sleeps (pinning, the host's answer).
//!
//! The kernel module compiles these same files: nothing but `core`, edition 2021, rustc 1.85, and
//! storage for records ([`map`]) that the caller allocates before it takes the lock.
#![no_std]
#![deny(unsafe_code)]

pub mod map;
pub mod ops;
pub mod record;
pub mod table;

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

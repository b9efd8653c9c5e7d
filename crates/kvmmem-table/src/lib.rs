// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mapping table of v1: the pages of a process that are replaced with another virtual machine's.
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
//! Only `mapped` and `quarantined` records hold a page. The thread that moves a record to
//! `unmapping` takes the page out of it, so two threads never hold the same page. [`table`] has the
//! transitions, which are called with the table's lock held. [`ops`] has the sequences that release
//! the lock while they sleep (pinning, the host's answer).
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

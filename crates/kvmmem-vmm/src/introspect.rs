// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a machine shows of targets as an introspector, and what it tells of itself as a target.
//!
//! `source` says where tokens lead, and `broker` makes the connection to the broker such a
//! source. Pages of v1 (`v1`) and views in windows (`window`) are opened by hypercalls
//! (`hypercall`) and end by the broker's events (`views`). `introspection` puts them
//! together. `pauses` answers the broker's questions about the vCPUs of a target.

pub(crate) mod broker;
mod hypercall;
pub(crate) mod introspection;
pub(crate) mod pauses;
mod registers;
pub mod source;
pub(crate) mod v1;
mod views;
pub(crate) mod window;

pub use v1::mapping_limit;

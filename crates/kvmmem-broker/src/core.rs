// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker decides: VMs, connections, grants, views, policies, quotas and revocations, as
//! plain data.
//!
//! No module here does I/O, reads a clock, starts a thread or takes a lock. The broker keeps one
//! [`Core`] under one lock, never holds that lock over a system call, and performs the
//! [`Effect`](effect::Effect)s once it has released it. `model` explores every order of the
//! operations with a few peers.

pub(crate) mod call;
pub(crate) mod call_error;
pub(crate) mod effect;
pub(crate) mod grants;
pub(crate) mod introduction;
pub(crate) mod layout;
pub(crate) mod limits;
mod machine;
#[cfg(test)]
mod model;
mod peers;
pub(crate) mod policy;
pub(crate) mod quota;
pub(crate) mod revocation;
pub(crate) mod role;
pub(crate) mod tokens;
pub(crate) mod views;
pub(crate) mod vms;

pub(crate) use machine::Core;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host's introspection service, as a library: the daemon `kvmmemd` is a thin program around
//! it, and a command of root's can run a [`Server`] of its own.
//!
//! VMMs register their VMs over a unix socket and keep the connection open while the VM runs;
//! operators add others, whose VMM knows nothing of the broker. A [`Broker`] decides about VMs,
//! grants and views and writes the audit log; a [`Service`] watches VMMs, keeps introspectors under
//! stock QEMUs and connects targets to tools. What travels is `kvmmem-proto`, the peers' ends are
//! `kvmmem-client` and `kvmmem::host`.
#![deny(unsafe_code)]

mod audit;
mod broker;
mod buffers;
mod calls;
mod connect;
mod connection;
mod copies;
mod core;
mod daemon;
mod external;
mod guest_endpoint;
mod hook;
mod introspector;
#[cfg(all(test, loom))]
mod loom_tests;
mod options;
mod outbox;
mod peer;
mod ram;
mod reactor;
mod registry;
mod server;
mod service;
mod session;
mod state;
mod sync;
mod tables;
#[cfg(test)]
mod test_peer;
#[cfg(test)]
mod test_wait;
mod vcpus;
mod vmm_questions;
mod workers;

pub use crate::audit::TARGET as AUDIT_TARGET;
pub use crate::broker::Broker;
pub use crate::core::call_error::CallError;
pub use crate::core::layout::Layout;
pub use crate::core::limits::Limits;
pub use crate::core::quota::Bound;
pub use crate::daemon::run_daemon;
pub use crate::introspector::{Introspector, OpenError, OpenView};
pub use crate::options::Options;
pub use crate::server::{Server, ServerError};
pub use crate::service::Service;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host's introspection service, as a library: the daemon `kvmmemd` is a thin program around
//! it.
//!
//! VMMs register their VMs over a unix socket and keep the connection open while the VM runs;
//! operators add others, whose VMM knows nothing of the broker. The broker keeps the VMs in a
//! [`registry`], connects targets to tools ([`hook`]), makes and revokes grants and writes an audit log ([`audit`]). Tools in guests under a stock QEMU connect
//! to the [`guest_endpoint`]. What travels is `kvmmem-proto`, the peers' ends are `kvmmem-client`
//! and `kvmmem::host`.
#![deny(unsafe_code)]

pub mod audit;
pub mod broker;
mod buffers;
mod calls;
mod connect;
mod connection;
pub mod copies;
mod core;
mod effects;
mod external;
pub mod guest_endpoint;
pub mod hook;
pub mod introspector;
pub mod options;
mod outbox;
pub mod peer;
pub mod ram;
mod reactor;
pub mod registry;
pub mod server;
mod session;
mod state;
#[cfg(test)]
mod test_peer;
mod vcpus;
mod vmm_questions;
mod workers;

pub use core::limits;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host's introspection service, as a library: the daemon `kvmmemd` is a thin program around it.
//!
//! VMMs register their VMs over a unix socket ([`wire`], [`packet`]) and keep the connection open as long as the VM
//! runs ([`link`] is their side, [`admin`] the command line's). The broker keeps the VMs in a [`registry`], connects
//! targets to tools ([`hook`]), gives out tokens and takes them back ([`grants`], [`scope`], [`policy`]) and writes it
//! all down ([`audit`]). A process of the host gets its view by [`host`].
#![deny(unsafe_code)]

pub mod audit;
pub mod broker;
mod buffers;
mod connect;
mod connection;
pub mod copies;
pub mod door;
mod external;
pub mod grants;
pub mod hook;
pub mod introspector;
pub mod options;
pub mod peer;
pub mod policy;
pub mod quota;
pub mod ram;
pub mod registry;
mod revoke;
mod role;
pub mod server;
mod session;
mod state;
#[cfg(test)]
mod test_peer;
mod tokens;
mod vcpus;
mod views;
mod vmm_questions;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host's introspection service, as a library: the daemon `kvmmemd` is a thin program around it.
//!
//! VMMs register their VMs over a unix socket ([`wire`], [`packet`]) and keep the connection open as long as the VM
//! runs ([`link`] is their side, [`admin`] the command line's).
#![deny(unsafe_code)]

pub mod endpoint;
pub mod link;
pub mod map;
pub mod packet;
pub mod wire;

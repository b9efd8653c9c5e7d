// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMMs that run on this host and know nothing of the broker: QEMU, Firecracker and Cloud
//! Hypervisor.
//!
//! The broker and the command line use this crate to list VMMs ([`discover`]), to open a VM's RAM
//! ([`attach`]) and to ask QEMU for registers, pauses and changes ([`qmp`], [`monitor`],
//! [`listener`]). A VMM is found by what the kernel shows of its process ([`process`], [`mapping`])
//! and attached without stopping it.
//!
//! The VMM and its guest are untrusted. A lie can only scramble the view of their own memory: the
//! file is the one that the kernel says this process has mapped, its size is checked, and it cannot
//! shrink.
#![deny(unsafe_code)]

pub mod acpi;
mod api;
pub mod attach;
pub mod backing;
pub mod boot_map;
mod bytes;
pub mod command_line;
pub mod confirm;
pub mod discover;
#[cfg(test)]
mod fake_qemu;
pub mod file_id;
pub mod find;
mod guest;
pub mod layout;
pub mod listener;
pub mod live_update;
pub mod mapping;
pub mod monitor;
pub mod monitors;
pub mod mtree;
pub mod obstacle;
pub mod options;
pub mod pause;
pub mod process;
pub mod qmp;
pub mod questions;
pub mod recognise;
mod unix_socket;
pub mod vmm;
pub mod windows;

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

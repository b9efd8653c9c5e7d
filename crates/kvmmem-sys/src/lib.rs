// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one crate of kvmmem on the host's and the tool's side that may use `unsafe`: each module
//! wraps one thing that the kernel offers and no well-kept crate wraps safely.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("kvmmem is for x86-64 Linux alone");

pub mod activation;
pub mod cachestat;
pub mod copy_buffer;
pub mod device;
pub mod foreign;
mod guarded;
pub mod huge;
pub mod internal_error;
pub mod memslot;
pub mod page;
pub mod pio;
pub mod ram;
pub mod search;
pub mod socket;
pub mod trap;
pub mod view;
pub mod window;
pub mod xen;

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

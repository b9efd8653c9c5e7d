// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Safe wrappers for kernel interfaces that no maintained crate wraps safely; the only crate of
//! kvmmem outside of the kernel with `unsafe` code.
//!
//! | module | wraps | used by |
//! |---|---|---|
//! | [`foreign`], [`search`] | mappings of another VM's memory, search in place | `kvmmem` |
//! | [`device`], [`view`], [`page`] | the ioctls of `/dev/kvmmem` | `kvmmem` |
//! | [`copy_buffer`] | the buffer in which the broker copies private RAM | `kvmmem`, broker |
//! | [`ram`], [`memslot`], [`window`] | guest RAM and memory slots | `kvmmem-vmm` |
//! | [`xen`], [`pio`], [`internal_error`] | KVM exits that kvm-ioctls lacks | `kvmmem-vmm` |
//! | [`trap`] | SIGSYS of the sandbox | `kvmmem-vmm` |
//! | [`huge`], [`huge_write`], [`cachestat`] | files of huge pages, page cache | broker, `kvmmem` |
//! | [`socket`], [`activation`] | peers of unix sockets, socket activation | broker |
//! | [`sigpipe`] | death by SIGPIPE | command line |
//!
//! Each `unsafe` block states why it is sound. A type with an invariant documents it.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("kvmmem is for x86-64 Linux alone");

pub mod activation;
pub mod cachestat;
pub mod copy_buffer;
pub mod device;
pub mod foreign;
mod guarded;
pub mod huge;
pub mod huge_write;
pub mod internal_error;
mod map_over;
pub mod memslot;
pub mod page;
pub mod pio;
pub mod ram;
pub mod search;
pub mod sigpipe;
pub mod socket;
pub mod trap;
pub mod view;
pub mod window;
pub mod xen;

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

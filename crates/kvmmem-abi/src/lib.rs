// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ABI between an introspection tool, its guest kernel and the host.
//!
//! Each module mirrors one part of `include/uapi/kvmmem.h`; a test compiles a C program against
//! that header and compares every size, offset and number. The kernel module compiles these same
//! files, so they use nothing but `core` and stay within the Rust edition and compiler of Debian's
//! kernels (edition 2021, rustc 1.85).
#![no_std]
#![deny(unsafe_code)]

pub mod cpuid;
pub mod descriptor;
pub mod errno;
pub mod hypercall;
pub mod ioctl;
pub mod native;
pub mod region;
pub mod token_list;

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

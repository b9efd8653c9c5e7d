// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections to the broker (`kvmmemd`): [`admin`] for operators and [`vmm`] for VMMs that
//! register their VM.
//!
//! The messages are those of `kvmmem-proto`. Processes that read a target use the crate `kvmmem`
//! instead.
#![deny(unsafe_code)]

pub mod admin;
pub mod vmm;

pub use kvmmem_proto::client::ClientError;

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

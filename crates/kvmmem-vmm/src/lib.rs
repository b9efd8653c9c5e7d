// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A small virtual machine monitor on `/dev/kvm`: devices for a Linux appliance, and the host's
//! side of kvmmem's hypercalls.
//!
//! The command line (`kvmmem vm`) and the test bed use it. [`run`] makes, runs and ends a machine
//! from a [`VmConfig`]: RAM ([`kvmmem_sys::ram`]), kernel and firmware tables (`boot`), devices
//! (`devices`), one thread per vCPU (`vcpu`), hypercalls (`hypercall`), pages mapped by v1
//! ([`mapping`]) and windows (`window`). The process of an introspector maps the memory of whole
//! targets, so it drops all rights that it does not need (`sandbox`).
#![deny(unsafe_code)]

mod boot;
mod config;
mod control;
mod cpuid;
mod devices;
mod error;
mod exit;
mod hypercall;
mod limit;
pub mod mapping;
mod pauses;
mod platform;
mod rendezvous;
mod sandbox;
mod signals;
mod status;
mod vcpu;
mod vm;
mod window;

pub use boot::{AcpiError, LoadError};
pub use config::{
    DiskConfig, HypercallMethod, MAX_DISKS, MAX_VCPUS, ResetPolicy, SerialConfig, VmConfig,
};
pub use control::{Control, StopHandle};
pub use cpuid::CpuidError;
pub use devices::vsock::VsockError;
pub use error::VmmError;
pub use exit::VmExit;
pub use sandbox::{AllowedCall, allowed_calls};
pub use status::{ActiveMethod, VmStatus};
pub use vcpu::{KvmFault, VcpuError};
pub use vm::run;
pub use window::{DescriptorsError, SetUpError, TakeError};

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

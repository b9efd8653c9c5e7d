// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A small virtual machine monitor on `/dev/kvm`: what a Linux appliance needs, and the host's side
//! of kvmmem's hypercalls.
//!
//! [`run`] takes a [`VmConfig`] through its life: RAM ([`kvmmem_sys::ram`]), kernel and firmware
//! tables (`boot`), devices (`devices`), one thread per vCPU (`vcpu`), hypercalls (`hypercall`),
//! the pages they map ([`mapping`]) and the windows they open (`window`). A VMM holds the memory of
//! whole targets, so it gives up what it does not need (`sandbox`).
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
pub use status::{ActiveMethod, VmStatus};
pub use vcpu::{KvmFault, VcpuError};
pub use vm::run;
pub use window::{DescriptorsError, SetUpError, TakeError};

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

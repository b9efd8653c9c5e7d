// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A small virtual machine monitor on `/dev/kvm`: devices for a Linux appliance, and the host's
//! side of kvmmem's hypercalls.
//!
//! The command line (`kvmmem vm`) and the test bed use it. [`run`] makes, runs and ends a machine
//! from a [`VmConfig`]. The plain machine (`machine`) has RAM, vCPUs, boot and devices, and knows
//! nothing of targets. What concerns them is in [`introspect`]: hypercalls, pages of v1, windows,
//! the connection to the broker. The process of an introspector maps the memory of whole targets,
//! so it drops all rights that it does not need (`sandbox`).
#![deny(unsafe_code)]

mod config;
mod control;
mod error;
mod exit;
pub mod introspect;
mod limit;
mod machine;
mod run;
mod sandbox;
mod signals;
mod status;

pub use config::{
    DiskConfig, HypercallMethod, MAX_DISKS, MAX_VCPUS, ResetPolicy, SerialConfig, VmConfig,
};
pub use control::Control;
pub use error::VmmError;
pub use exit::VmExit;
pub use introspect::introspection::NoXen;
pub use introspect::v1::MapError;
pub use introspect::window::{DescriptorsError, SetUpError, TakeError};
pub use machine::error::MachineError;
pub use machine::stop::{Failure, StopHandle};
pub use machine::vcpu::{KvmFault, VcpuError};
pub use machine::{AcpiError, CpuidError, LoadError, VsockError};
pub use run::run;
pub use sandbox::{AllowedCall, allowed_calls};
pub use status::{ActiveMethod, VmStatus};

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

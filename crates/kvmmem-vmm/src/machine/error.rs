// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors of the plain machine.

use std::io;
use std::path::PathBuf;

use kvmmem_sys::ram::RamError;

use super::boot::{AcpiError, LoadError};
use super::cpuid::CpuidError;
use super::devices::vsock::VsockError;
use super::stop::Failure;
use super::vcpu::VcpuError;

/// Why a machine could not be made, or could not continue.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration asks for something that no machine has.
    #[error("{0}")]
    Config(String),
    /// `/dev/kvm` is missing or not accessible.
    #[error("cannot open /dev/kvm")]
    OpenKvm(#[source] kvm_ioctls::Error),
    /// Guest RAM could not be made.
    #[error("cannot make guest RAM")]
    Ram(#[from] RamError),
    /// KVM refused a part of the machine.
    #[error("cannot set up {what}")]
    Kvm {
        /// Which part.
        what: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// The host's kernel refused something else that the machine needs.
    #[error("cannot set up {what}")]
    Host {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A disk could not be opened.
    #[error("cannot open disk {path:?}")]
    Disk {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file for serial output could not be made.
    #[error("cannot open the serial port's output")]
    Serial(#[source] io::Error),
    /// The vsock device could not be made.
    #[error("cannot make the vsock device")]
    Vsock(#[from] VsockError),
    /// The CPUID table could not be made.
    #[error("cannot make the CPUID table")]
    Cpuid(#[from] CpuidError),
    /// The kernel could not be loaded.
    #[error("cannot load the kernel")]
    Load(#[from] LoadError),
    /// The ACPI tables could not be written.
    #[error("cannot write the ACPI tables")]
    Acpi(#[from] AcpiError),
    /// The page tables or boot parameters could not be written.
    #[error("cannot write the boot structures to RAM: {0}")]
    Boot(String),
    /// A vCPU failed.
    #[error("a vCPU failed")]
    Vcpu(#[from] VcpuError),
    /// What the machine shows of targets could not be set up.
    #[error(transparent)]
    Introspection(Failure),
}

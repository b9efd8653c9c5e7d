// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors that end a machine or keep it from starting.

use std::io;
use std::path::PathBuf;

use kvmmem_client::ClientError;
use kvmmem_sys::ram::RamError;

use crate::boot::{AcpiError, LoadError};
use crate::cpuid::CpuidError;
use crate::devices::vsock::VsockError;
use crate::mapping::MapError;
use crate::vcpu::VcpuError;
use crate::window::{SetUpError, TakeError};

/// Why a machine could not be made, or could not continue.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The configuration asks for something that no machine has.
    #[error("{0}")]
    Config(String),
    /// `/dev/kvm` is missing or not accessible.
    #[error("cannot open /dev/kvm")]
    OpenKvm(#[source] kvm_ioctls::Error),
    /// This host cannot forward hypercalls.
    #[error(
        "the host's KVM cannot forward hypercalls (no KVM_CAP_XEN_HVM with INTERCEPT_HCALL); use method port"
    )]
    NoXen,
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
    /// Mappings could not be undone, for a reset or because a grant was revoked.
    #[error("cannot undo the machine's mappings")]
    Unmap(#[source] MapError),
    /// No address space or memory is left for windows.
    #[error("cannot make the machine's windows")]
    Windows(#[from] SetUpError),
    /// A view has ended, and the guest could still reach the target's memory by it.
    #[error("cannot take a view's memory from the guest")]
    Take(#[from] TakeError),
    /// A file that the machine's sandbox may have refused.
    #[error(
        "the machine's sandbox opens nothing but {allowed}: keep the file there, or use --no-sandbox"
    )]
    Sandbox {
        /// What it opens.
        allowed: String,
        /// Why the machine ended.
        source: Box<VmmError>,
    },
    /// The broker did not take the registration.
    #[error("cannot register with the broker at {path:?}")]
    Broker {
        /// The broker's socket.
        path: PathBuf,
        /// Why.
        source: ClientError,
    },
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors of vCPUs.

use std::io;

use super::internal_error::KvmFault;
use crate::machine::cpuid::CpuidError;

/// Why a vCPU could not start or continue.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused to set a part of its state.
    #[error("cannot set {what} of vCPU {id}")]
    Setup {
        /// The vCPU.
        id: u8,
        /// Which part.
        what: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// The CPUID table could not be made.
    #[error("cannot make the CPUID table of vCPU {id}")]
    Cpuid {
        /// The vCPU.
        id: u8,
        /// Why.
        source: CpuidError,
    },
    /// The thread could not be started.
    #[error("cannot start the thread of vCPU {id}")]
    Thread {
        /// The vCPU.
        id: u8,
        /// Why.
        source: io::Error,
    },
    /// What it reads from ports could not be mapped.
    #[error("cannot map the port data of vCPU {id}")]
    PortData {
        /// The vCPU.
        id: u8,
        /// Why.
        source: io::Error,
    },
    /// `KVM_RUN` failed.
    #[error("cannot run vCPU {id}")]
    Run {
        /// The vCPU.
        id: u8,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// The vCPU's registers could not be read.
    #[error("cannot read the registers of vCPU {id}")]
    Registers {
        /// The vCPU.
        id: u8,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// KVM could not run the guest any further.
    #[error(
        "KVM stopped vCPU {id} with an internal error: {fault}; restart the VM, and see the host's kernel log"
    )]
    InternalError {
        /// The vCPU.
        id: u8,
        /// What KVM reported.
        fault: KvmFault,
    },
    /// KVM cannot continue, or exited for a reason that this machine never causes.
    #[error("vCPU {id} stopped: {exit}")]
    Exit {
        /// The vCPU.
        id: u8,
        /// The exit, as KVM names it.
        exit: String,
    },
}

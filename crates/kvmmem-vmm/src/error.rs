// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors that end a machine or keep it from starting.

use std::path::PathBuf;

use kvmmem_client::ClientError;

use crate::introspect::introspection::NoXen;
use crate::introspect::v1::MapError;
use crate::introspect::window::{SetUpError, TakeError};
use crate::machine::error::MachineError;
use crate::machine::stop::Failure;
use crate::machine::vcpu::VcpuError;

/// Why a machine could not be made, or could not continue.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The plain machine could not be made, or could not continue.
    #[error(transparent)]
    Machine(MachineError),
    /// This host cannot forward hypercalls.
    #[error(transparent)]
    NoXen(#[from] NoXen),
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
    /// Another error while the machine ran.
    #[error(transparent)]
    Other(Failure),
}

impl From<MachineError> for VmmError {
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Introspection(failure) => Self::of_failure(failure),
            error => Self::Machine(error),
        }
    }
}

impl VmmError {
    /// Why a machine does not run, or no longer.
    pub(crate) fn of_failure(failure: Failure) -> Self {
        Err(failure)
            .or_else(|failure| {
                failure.downcast().map(|error: Box<VcpuError>| MachineError::Vcpu(*error).into())
            })
            .or_else(|failure: Failure| {
                failure.downcast().map(|error: Box<MapError>| Self::Unmap(*error))
            })
            .or_else(|failure: Failure| {
                failure.downcast().map(|error: Box<TakeError>| Self::Take(*error))
            })
            .or_else(|failure: Failure| {
                failure.downcast().map(|error: Box<SetUpError>| Self::Windows(*error))
            })
            .or_else(|failure: Failure| {
                failure.downcast().map(|error: Box<NoXen>| Self::NoXen(*error))
            })
            .unwrap_or_else(Self::Other)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a VMM's token is of no use.

use kvmmem_proto::map::SHARE_IT;
use kvmmem_proto::message::Refusal;

/// Why a token was not traded for a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedeemError {
    /// The token is unknown, used, expired or another holder's.
    #[error("token is unknown, used, expired or revoked")]
    Unknown,
    /// The broker cannot be asked now.
    #[error("the broker cannot be reached")]
    Unavailable,
    /// This VM is not registered as an introspector.
    #[error("this VM may not map the memory of others")]
    Denied,
    /// This process may open no more files, so those of the target have not arrived. The token
    /// keeps its use.
    #[error("no file descriptor is left for the target's RAM; raise the limit of open files")]
    NoDescriptors,
    /// The target's RAM is private to its VMM.
    #[error("the target's RAM is private to its VMM and cannot be mapped; {SHARE_IT}")]
    Private,
}

impl From<Refusal> for RedeemError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unknown => Self::Unknown,
            Refusal::Denied | Refusal::Invalid => Self::Denied,
            Refusal::Unsupported => Self::Private,
            Refusal::Malformed | Refusal::Exists | Refusal::Limit | Refusal::Busy => {
                Self::Unavailable
            }
        }
    }
}

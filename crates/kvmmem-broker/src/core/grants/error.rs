// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why no grant was made, and why a token opened nothing.

use kvmmem_proto::message::Refusal;

use crate::core::limits::{MAX_KVMI_PER_TARGET, MAX_VIEWS_PER_PEER};
use crate::core::quota::Exceeded;
use crate::core::refused::Refused;

/// Why no grant was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MintError {
    /// The target has [`MAX_KVMI_PER_TARGET`] tokens of KVMI's outstanding.
    #[error("target {0} has {MAX_KVMI_PER_TARGET} tokens outstanding; they expire within 3 s")]
    Outstanding(u64),
    /// There are too many grants.
    #[error("grants")]
    Full(#[source] Exceeded),
}

/// Why a token opened nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UseError {
    /// The token is unknown, used, expired, revoked or somebody else's.
    #[error("token is unknown, used, expired or revoked")]
    Unknown,
    /// The token is for the VM that brings it.
    #[error("a VM cannot map its own memory")]
    Own,
    /// The connection has [`MAX_VIEWS_PER_PEER`] views.
    #[error("this connection has {MAX_VIEWS_PER_PEER} views already; close one")]
    TooManyViews,
}

impl From<UseError> for Refused {
    fn from(error: UseError) -> Self {
        let refusal = match error {
            UseError::Unknown => Refusal::Unknown,
            UseError::Own => Refusal::Denied,
            UseError::TooManyViews => Refusal::Limit,
        };
        Self::new(refusal, error)
    }
}

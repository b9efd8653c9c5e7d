// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why no grant was made, and why a token opened nothing.

use kvmmem_proto::message::Refusal;

use crate::core::call_error::CallError;
use crate::core::limits::{MAX_KVMI_PER_TARGET, MAX_VIEWS_PER_PEER};
use crate::core::quota::QuotaError;

/// Why no grant was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MintError {
    #[error("target {0} has {MAX_KVMI_PER_TARGET} tokens outstanding; they expire within 3 s")]
    Outstanding(u64),
    #[error("grants")]
    Full(#[source] QuotaError),
}

/// Why a token opened nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UseError {
    #[error("token is unknown, used, expired or revoked")]
    Unknown,
    #[error("a VM cannot map its own memory")]
    Own,
    #[error("this connection has {MAX_VIEWS_PER_PEER} views already; close one")]
    TooManyViews,
}

impl From<UseError> for CallError {
    fn from(error: UseError) -> Self {
        let refusal = match error {
            UseError::Unknown => Refusal::Unknown,
            UseError::Own => Refusal::Denied,
            UseError::TooManyViews => Refusal::Limit,
        };
        Self::new(refusal, error)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Calls that are refused.

use std::error::Error;

use kvmmem_proto::message::Refusal;

/// A call that was refused, with what the peer gets to know.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    /// Which kind of failure.
    pub refusal: Refusal,
    /// The failure in words.
    pub message: String,
}

impl CallError {
    /// Of an error and all that is behind it: a peer gets one text.
    pub(crate) fn from_error(refusal: Refusal, error: &dyn Error) -> Self {
        Self { refusal, message: in_words(error) }
    }

    /// The peer can neither get what belongs to the target, nor will it soon.
    pub(crate) fn busy() -> Self {
        Self::new(Refusal::Busy, "the target is gone, or the VMM does not read")
    }

    pub(crate) fn new(refusal: Refusal, message: impl ToString) -> Self {
        Self { refusal, message: message.to_string() }
    }
}

/// An error and what is behind it, in one line.
pub(crate) fn in_words(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words.push_str(": ");
        words.push_str(&error.to_string());
        source = error.source();
    }
    words
}

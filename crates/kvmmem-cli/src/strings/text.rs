// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A string in memory.

use clap::ValueEnum;
use serde::Serialize;

/// How characters are written in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Encoding {
    /// A byte each.
    Ascii,
    /// Two bytes each, the lower one first.
    Utf16,
}

/// A string.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Text {
    pub(super) at: u64,
    pub(super) encoding: Encoding,
    pub(super) text: String,
}

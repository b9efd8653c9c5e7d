// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A byte of a pattern.

/// A byte of a pattern; only the bits in `mask` are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskedByte {
    /// Value of the compared bits.
    pub value: u8,
    /// The compared bits.
    pub mask: u8,
}

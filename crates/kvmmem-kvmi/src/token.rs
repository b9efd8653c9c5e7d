// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The token of GET_MAP_TOKEN.

use std::fmt;

use subtle::{Choice, ConstantTimeEq};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// The secret that names a grant (`struct kvmi_map_mem_token`): 256 bits, used once.
///
/// Compared in constant time, wiped on drop, never printed.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Token([u64; 4]);

impl Token {
    /// Size on the wire and in guest memory, bytes.
    pub const SIZE: usize = 32;

    /// The token of these four words.
    pub const fn new(words: [u64; 4]) -> Self {
        Self(words)
    }

    /// The four words, as an ioctl or a hypercall takes them.
    pub const fn words(&self) -> [u64; 4] {
        self.0
    }

    /// Reads the token's little-endian bytes.
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        let mut token = Self([0; 4]);
        for (word, bytes) in token.0.iter_mut().zip(words) {
            *word = u64::from_le_bytes(*bytes);
        }
        token
    }

    /// The token's little-endian bytes. The caller wipes them.
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let (chunks, _) = bytes.as_chunks_mut::<8>();
        for (chunk, word) in chunks.iter_mut().zip(self.0) {
            *chunk = word.to_le_bytes();
        }
        bytes
    }
}

impl ConstantTimeEq for Token {
    fn ct_eq(&self, other: &Self) -> Choice {
        self.0.ct_eq(&other.0)
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.ct_eq(other).into()
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_little_endian_words() {
        let mut bytes = [0; 32];
        for (index, byte) in (0u8..).zip(&mut bytes) {
            *byte = index;
        }
        let token = Token::from_bytes(&bytes);
        assert_eq!(token.words()[0], 0x0706_0504_0302_0100);
        assert_eq!(token.words()[3], 0x1f1e_1d1c_1b1a_1918);
        assert_eq!(token.to_bytes(), bytes);
    }

    #[test]
    fn debug_tells_nothing() {
        assert_eq!(format!("{:?}", Token::new([1, 2, 3, 4])), "Token(..)");
    }
}

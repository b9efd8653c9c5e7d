// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The token of GET_MAP_TOKEN.

use std::fmt;
use std::str::FromStr;

use subtle::{Choice, ConstantTimeEq};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

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

    /// The token as 64 hexadecimal digits: its bytes in the order of the wire. [`FromStr`] reads
    /// them.
    pub fn to_hex(&self) -> Zeroizing<String> {
        let bytes = Zeroizing::new(self.to_bytes());
        // The full capacity at once: growing would leave a copy in freed memory.
        let mut text = Zeroizing::new(String::with_capacity(2 * Self::SIZE));
        for byte in bytes.iter() {
            for nibble in [byte >> 4, byte & 0xf] {
                text.push(char::from_digit(nibble.into(), 16).unwrap_or_default());
            }
        }
        text
    }
}

/// The text is not a token. The error does not repeat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a token is 64 hexadecimal digits, as kvmmem grant create prints it")]
pub struct NotAToken;

impl FromStr for Token {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, NotAToken> {
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(NotAToken) };
        let mut bytes = Zeroizing::new([0; Self::SIZE]);
        if pairs.len() != bytes.len() {
            return Err(NotAToken);
        }
        let digit =
            |character: u8| char::from(character).to_digit(16).and_then(|n| u8::try_from(n).ok());
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            let (high, low) = digit(*high).zip(digit(*low)).ok_or(NotAToken)?;
            *byte = (high << 4) | low;
        }
        Ok(Self::from_bytes(&bytes))
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
    fn text_is_64_digits() {
        let text: String = (0..32).map(|byte| format!("{byte:02x}")).collect();
        let token: Token = text.parse().unwrap();
        assert_eq!(token.words()[0], 0x0706_0504_0302_0100);
        assert_eq!(*token.to_hex(), text);
        assert_eq!(text.to_uppercase().parse(), Ok(token));
        let (short, long, prefixed) =
            (&text[1..], format!("{text}00"), format!("0x{}", &text[2..]));
        for bad in
            ["", "00", short, &long, &prefixed, &"zz".repeat(32), &"+1".repeat(32), &"é".repeat(32)]
        {
            assert_eq!(bad.parse::<Token>(), Err(NotAToken), "{bad}");
        }
    }

    #[test]
    fn debug_tells_nothing() {
        assert_eq!(format!("{:?}", Token::new([1, 2, 3, 4])), "Token(..)");
    }
}

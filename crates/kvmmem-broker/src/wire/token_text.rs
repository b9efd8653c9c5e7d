// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A token as 64 hexadecimal digits: its 32 bytes in the order of the wire.

use std::fmt;

use kvmmem_kvmi::token::Token;
use serde::de::{Error, Visitor};
use serde::{Deserializer, Serializer};
use zeroize::Zeroizing;

pub(crate) fn serialize<S: Serializer>(token: &Token, serializer: S) -> Result<S::Ok, S::Error> {
    let bytes = Zeroizing::new(token.to_bytes());
    let mut text = Zeroizing::new(String::with_capacity(2 * Token::SIZE));
    for byte in bytes.iter() {
        for nibble in [byte >> 4, byte & 0xf] {
            text.push(char::from_digit(nibble.into(), 16).unwrap_or_default());
        }
    }
    serializer.serialize_str(&text)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Token, D::Error> {
    deserializer.deserialize_str(Digits)
}

/// Reads the digits where they lie.
struct Digits;

impl Visitor<'_> for Digits {
    type Value = Token;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("64 hexadecimal digits")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Token, E> {
        let wrong = || E::custom("token is not 64 hexadecimal digits");
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(wrong()) };
        let mut bytes = Zeroizing::new([0; Token::SIZE]);
        if pairs.len() != bytes.len() {
            return Err(wrong());
        }
        let digit = |character: u8| char::from(character).to_digit(16).and_then(|n| u8::try_from(n).ok());
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            let (high, low) = digit(*high).zip(digit(*low)).ok_or_else(wrong)?;
            *byte = (high << 4) | low;
        }
        Ok(Token::from_bytes(&bytes))
    }
}

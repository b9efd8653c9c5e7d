// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A token as 64 hexadecimal digits: its 32 bytes in the order of the wire.

use std::fmt;

use kvmmem_kvmi::token::Token;
use serde::de::{Error, Visitor};
use serde::{Deserializer, Serializer};

pub(crate) fn serialize<S: Serializer>(token: &Token, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&token.to_hex())
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
        text.parse().map_err(E::custom)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is searched for: bytes, with bits that may be anything, or a regular expression.

mod bytes;
mod regular;

use std::ops::Range;

use anyhow::Result;
use kvmmem::search::Probe;

use crate::failure::usage;
use bytes::{Bytes, MAX_LEN};
use regular::Regular;

/// How a pattern is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Hexadecimal digits; `?` is any digit.
    Hex,
    /// Text in UTF-8.
    Text,
    /// Text in UTF-16, little-endian.
    Utf16,
    /// A regular expression over bytes.
    Regex,
}

/// A pattern, ready to be searched for.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    name: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Bytes(Bytes),
    Regular(Regular),
}

impl Pattern {
    /// Reads a pattern, whose name is as the user wrote it.
    pub(super) fn new(form: Form, text: &str, ignores_case: bool) -> Result<Self, String> {
        let is_folded = ignores_case && !text.is_ascii();
        let kind = match form {
            Form::Hex => Kind::Bytes(Bytes::from_hex(text)?),
            // Letters whose cases differ in more than a bit.
            Form::Text if is_folded => Kind::Regular(Regular::folded(text, char_utf8)?),
            Form::Utf16 if is_folded => Kind::Regular(Regular::folded(text, char_utf16)?),
            Form::Text => Kind::Bytes(Bytes::from_text(text.bytes(), ignores_case)?),
            Form::Utf16 => {
                let bytes = text.encode_utf16().flat_map(u16::to_le_bytes);
                Kind::Bytes(Bytes::from_text(bytes, ignores_case)?)
            }
            Form::Regex => Kind::Regular(Regular::new(text, ignores_case)?),
        };
        Ok(Self { name: text.to_owned(), kind })
    }

    /// Reads the patterns of the command line.
    pub(super) fn all(form: Form, texts: &[String], ignores_case: bool) -> Result<Vec<Self>> {
        let read = |text: &String| {
            Self::new(form, text, ignores_case)
                .map_err(|error| usage(format!("invalid pattern {text:?}: {error}")))
        };
        texts.iter().map(read).collect()
    }

    /// The pattern with another name.
    pub(super) fn named(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// The pattern as the user wrote it, or its name in a file.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Length of the longest match in bytes, at least 1.
    pub(super) fn len(&self) -> usize {
        match &self.kind {
            Kind::Bytes(bytes) => bytes.len(),
            Kind::Regular(_) => MAX_LEN,
        }
    }

    /// Bytes before the first place that must be looked at, so that places do not depend on where a
    /// search began.
    pub(super) fn lookback(&self) -> usize {
        match &self.kind {
            Kind::Bytes(_) => 0,
            Kind::Regular(_) => MAX_LEN,
        }
    }

    /// A probe that finds places without a copy, and its place in the pattern.
    pub(super) fn probe(&self) -> Option<(&Probe, usize)> {
        match &self.kind {
            Kind::Bytes(bytes) => Some(bytes.probe()),
            Kind::Regular(_) => None,
        }
    }

    /// Some of its bytes in a row, letters in lower case, and the place of the first.
    pub(super) fn key(&self) -> Option<(usize, Vec<u8>)> {
        match &self.kind {
            Kind::Bytes(bytes) => bytes.key(),
            Kind::Regular(_) => None,
        }
    }

    /// The match that begins at `start`, of a pattern with a key.
    pub(super) fn at(&self, memory: &[u8], start: usize) -> Option<Range<usize>> {
        match &self.kind {
            Kind::Bytes(bytes) => bytes.at(memory, start),
            Kind::Regular(_) => None,
        }
    }

    /// The matches that begin at one of the `starts` in `memory`, ascending, with their ends.
    pub(super) fn find<'a>(
        &'a self,
        memory: &'a [u8],
        starts: Range<usize>,
    ) -> Box<dyn Iterator<Item = Range<usize>> + 'a> {
        match &self.kind {
            Kind::Bytes(bytes) => Box::new(bytes.find(memory, starts)),
            Kind::Regular(regular) => Box::new(regular.find(memory, starts)),
        }
    }
}

fn char_utf8(letter: char) -> Vec<u8> {
    letter.to_string().into_bytes()
}

fn char_utf16(letter: char) -> Vec<u8> {
    letter.encode_utf16(&mut [0; 2]).iter().flat_map(|unit| unit.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ignoring_case(form: Form, text: &str, memory: &[u8]) -> Vec<(usize, usize)> {
        let pattern = Pattern::new(form, text, true).unwrap();
        pattern.find(memory, 0..memory.len()).map(|found| (found.start, found.end)).collect()
    }

    #[test]
    fn case_is_ignored() {
        assert_eq!(
            ignoring_case(Form::Text, "PassWord1[", b"xpAssword1[ PASSWORD1{ password1["),
            [(1, 11), (23, 33)]
        );
        assert_eq!(ignoring_case(Form::Text, "grüße", "GRÜßE gruße".as_bytes()), [(0, 7)]);
        let text = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        assert_eq!(ignoring_case(Form::Utf16, "Key", &text("a kEY")), [(4, 10)]);
        assert_eq!(ignoring_case(Form::Utf16, "ключ", &text("a КЛЮч")), [(4, 12)]);
        assert_eq!(ignoring_case(Form::Regex, "a[b-c]+", b"xABCa"), [(1, 4)]);
        // Digits that a folded letter would be: 0x13 and '3', '@' and '`'.
        assert_eq!(ignoring_case(Form::Text, "3@", b"\x13@3`3@"), [(4, 6)]);
    }

    #[test]
    fn names_are_as_written() {
        let patterns = Pattern::all(Form::Hex, &["4? ?f".into(), "00".into()], false).unwrap();
        assert_eq!(patterns.iter().map(Pattern::name).collect::<Vec<_>>(), ["4? ?f", "00"]);
        let error = Pattern::all(Form::Hex, &["zz".into()], false).unwrap_err();
        assert!(
            crate::failure::exit_code(&error) == Some(crate::failure::USAGE)
                && error.to_string().contains("\"zz\""),
            "{error}"
        );
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is searched for: bytes, some of which may be anything.

use memchr::memmem::Finder;

/// The longest pattern in bytes.
pub(super) const MAX_LEN: usize = 4096;

/// A pattern, ready to be searched for.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    /// As the user wrote it.
    name: String,
    /// `None` matches any byte.
    bytes: Vec<Option<u8>>,
    /// Place of the longest part without wildcards, and the search for it.
    anchor: usize,
    finder: Finder<'static>,
}

impl Pattern {
    /// Reads pairs of hexadecimal digits, with `??` for any byte; blanks may stand between them.
    pub(super) fn from_hex(text: &str) -> Result<Self, String> {
        const FORM: &str = "write bytes as pairs of hexadecimal digits, ?? for any byte, for example 4889e5??c3; for text, give --text";
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b' ').collect();
        let (pairs, rest) = digits.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(FORM.into());
        }
        let digit = |character: u8| char::from(character).to_digit(16);
        let byte = |pair: &[u8; 2]| match pair {
            b"??" => Some(None),
            [high, low] => Some(Some(u8::try_from(digit(*high)? << 4 | digit(*low)?).ok()?)),
        };
        let bytes: Option<Vec<Option<u8>>> = pairs.iter().map(byte).collect();
        Self::new(text, bytes.ok_or(FORM)?)
    }

    /// The text's bytes in UTF-8.
    pub(super) fn from_text(text: &str) -> Result<Self, String> {
        Self::new(text, text.bytes().map(Some).collect())
    }

    /// The text in UTF-16, little-endian, as Windows holds it.
    pub(super) fn from_utf16(text: &str) -> Result<Self, String> {
        Self::new(text, text.encode_utf16().flat_map(u16::to_le_bytes).map(Some).collect())
    }

    fn new(name: &str, bytes: Vec<Option<u8>>) -> Result<Self, String> {
        if bytes.len() > MAX_LEN {
            return Err(format!("the pattern has {} bytes, at most {MAX_LEN} are taken", bytes.len()));
        }
        let mut anchor = (0, 0);
        let mut start = 0;
        for part in bytes.split(Option::is_none) {
            if part.len() > anchor.1 {
                anchor = (start, part.len());
            }
            start += part.len() + 1;
        }
        let literal: Vec<u8> = bytes.iter().skip(anchor.0).take(anchor.1).copied().flatten().collect();
        if literal.is_empty() {
            return Err("the pattern is empty or matches anything: give at least one byte".into());
        }
        Ok(Self {
            name: name.to_owned(),
            bytes,
            anchor: anchor.0,
            finder: Finder::new(&literal).into_owned(),
        })
    }

    /// The pattern as the user wrote it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Length in bytes, at least 1.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The places in `memory` where the pattern begins and fits, ascending; they may overlap.
    pub(super) fn find<'a>(&'a self, memory: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
        // Of the bytes before the anchor, a match needs as many before the anchor's place.
        let mut from = self.anchor;
        std::iter::from_fn(move || {
            loop {
                let found = from + self.finder.find(memory.get(from..)?)?;
                from = found + 1;
                let start = found - self.anchor;
                if memory.get(start..start + self.bytes.len()).is_some_and(|part| self.matches(part)) {
                    return Some(start);
                }
            }
        })
    }

    fn matches(&self, memory: &[u8]) -> bool {
        self.bytes.iter().zip(memory).all(|(wanted, byte)| wanted.is_none_or(|wanted| wanted == *byte))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn patterns_are_read() {
        let find = |pattern: Pattern, memory: &[u8]| pattern.find(memory).collect::<Vec<_>>();
        assert_eq!(
            find(Pattern::from_hex("48 89 ?? c3").unwrap(), b"\x48\x89\xe5\xc3\x48\x89\xc3\xc3\xff"),
            [0, 4]
        );
        assert_eq!(find(Pattern::from_hex("??aa").unwrap(), b"\xaa\xaa\xaa"), [0, 1]);
        assert_eq!(find(Pattern::from_hex("AA????").unwrap(), b"\xaa\xaa\xaa\xaa"), [0, 1]);
        assert_eq!(find(Pattern::from_text("aa").unwrap(), b"aaaa"), [0, 1, 2]);
        assert_eq!(find(Pattern::from_utf16("hé").unwrap(), b"xh\0\xe9\0"), [1]);
        for text in ["", "4", "4?", "??", "????", "zz", "+1", "ä", "0x12"] {
            assert!(Pattern::from_hex(text).is_err(), "{text}");
        }
        assert!(Pattern::from_text("").is_err());
        assert!(Pattern::from_text(&"a".repeat(MAX_LEN + 1)).unwrap_err().contains("4097"));
    }

    proptest! {
        #[test]
        fn the_places_are_those_of_a_plain_search(
            // Few letters, so that there are matches, and matches that overlap.
            bytes in proptest::collection::vec(proptest::option::weighted(0.7, 0u8..2), 1..6),
            memory in proptest::collection::vec(0u8..2, 0..64),
        ) {
            if let Ok(pattern) = Pattern::new("", bytes.clone()) {
                let plain: Vec<usize> = memory
                    .windows(bytes.len())
                    .enumerate()
                    .filter(|(_, part)| bytes.iter().zip(*part).all(|(b, p)| b.is_none() || *b == Some(*p)))
                    .map(|(at, _)| at)
                    .collect();
                prop_assert_eq!(pattern.find(&memory).collect::<Vec<_>>(), plain);
            } else {
                prop_assert!(bytes.iter().all(Option::is_none));
            }
        }
    }
}

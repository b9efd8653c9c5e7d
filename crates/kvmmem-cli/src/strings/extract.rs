// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The text in a piece of memory.

use super::text::Encoding;

/// The longest string that is printed as one, in characters.
pub(super) const MAX_LEN: u16 = 4096;

/// Where the characters of a string lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    /// One after the other.
    Bytes,
    /// At even addresses.
    Even,
    /// At odd addresses.
    Odd,
}

impl Stream {
    pub(super) const ALL: [Self; 3] = [Self::Bytes, Self::Even, Self::Odd];

    /// Bytes of a character.
    pub(super) fn width(self) -> u64 {
        if self == Self::Bytes { 1 } else { 2 }
    }

    pub(super) fn encoding(self) -> Encoding {
        if self == Self::Bytes { Encoding::Ascii } else { Encoding::Utf16 }
    }
}

/// A string, or what a piece has of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fragment {
    pub(super) start: u64,
    pub(super) stream: Stream,
    /// Printable ASCII.
    pub(super) text: Vec<u8>,
    /// It may have begun in the piece before.
    pub(super) is_begun: bool,
    /// It may continue in the next piece.
    pub(super) goes_on: bool,
}

impl Fragment {
    pub(super) fn encoding(&self) -> Encoding {
        self.stream.encoding()
    }
}

fn is_text(byte: u8) -> bool {
    matches!(byte, b' '..=b'~' | b'\t')
}

/// The strings of at least `min` characters in the first `len` bytes of memory from `start` on, and
/// all that touch an end of these bytes. `memory` has the byte after them too, unless memory ends.
pub(super) fn extract(start: u64, memory: &[u8], len: usize, min: usize) -> Vec<Fragment> {
    let mut fragments = Vec::new();
    for stream in Stream::ALL {
        match stream {
            Stream::Bytes => extract_stream::<1>(start, memory, len, min, stream, &mut fragments),
            _ => extract_stream::<2>(start, memory, len, min, stream, &mut fragments),
        }
    }
    fragments
}

/// Adds the strings of a stream whose characters have `STEP` bytes.
fn extract_stream<const STEP: usize>(
    start: u64,
    memory: &[u8],
    len: usize,
    min: usize,
    stream: Stream,
    fragments: &mut Vec<Fragment>,
) {
    let first = match stream {
        Stream::Bytes => 0,
        Stream::Even => usize::from(!start.is_multiple_of(2)),
        Stream::Odd => usize::from(start.is_multiple_of(2)),
    };
    let is_character = |at: usize| {
        memory.get(at).is_some_and(|byte| is_text(*byte))
            && (STEP == 1 || memory.get(at + 1) == Some(&0))
    };
    let mut at = first;
    while at < len {
        if has_none::<STEP>(memory, at) {
            at += WORD;
            continue;
        }
        let mut end = at;
        while end < len && is_character(end) {
            end += STEP;
        }
        let (is_begun, goes_on) = (at == first, end >= len);
        if end > at && ((end - at) / STEP >= min || is_begun || goes_on) {
            let bytes = memory.get(at..end.min(memory.len())).unwrap_or_default();
            fragments.push(Fragment {
                start: start + at as u64,
                stream,
                text: match STEP {
                    1 => bytes.to_vec(),
                    _ => bytes.iter().step_by(STEP).copied().collect(),
                },
                is_begun,
                goes_on,
            });
        }
        // There is no character at `end`.
        at = end + STEP;
    }
}

/// Bytes that [`has_none`] looks at.
const WORD: usize = size_of::<u64>();

/// Whether no character of `STEP` bytes begins in the [`WORD`] bytes at `at`: they are all zero,
/// or, for characters of two bytes, none of the next ones is. `false` where that is not known.
fn has_none<const STEP: usize>(memory: &[u8], at: usize) -> bool {
    const ONES: u64 = u64::from_ne_bytes([1; WORD]);
    const HIGH: u64 = ONES << 7;
    let word = |at: usize| Some(u64::from_ne_bytes(*memory.get(at..)?.first_chunk()?));
    let has_zero = |word: u64| word.wrapping_sub(ONES) & !word & HIGH != 0;
    word(at) == Some(0) || STEP == 2 && word(at + 1).is_some_and(|next| !has_zero(next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_both_encodings_are_found() {
        let memory = b"\0hello\xffabc\0\0w\0i\0d\0e\0\0\0\0o\0d\0d\0!\0\xff";
        let found = extract(0x1000, memory, memory.len(), 4);
        let found: Vec<_> = found
            .iter()
            .map(|one| (one.start, one.stream, std::str::from_utf8(&one.text).unwrap()))
            .collect();
        assert_eq!(
            found,
            [
                (0x1001, Stream::Bytes, "hello"),
                (0x100c, Stream::Even, "wide"),
                (0x1017, Stream::Odd, "odd!")
            ]
        );
    }

    #[test]
    fn what_touches_an_end_is_kept() {
        let found = extract(0x1000, b"a\0\0\0\0b", 5, 4);
        let ends: Vec<_> =
            found.iter().map(|one| (one.stream, one.is_begun, one.goes_on)).collect();
        // The last byte lies after the piece.
        assert_eq!(ends, [(Stream::Bytes, true, false), (Stream::Even, true, false)]);
        let found = extract(0x1001, b"xa\0", 2, 4);
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[1].stream, found[1].start, found[1].goes_on),
            (Stream::Even, 0x1002, true)
        );
    }
}

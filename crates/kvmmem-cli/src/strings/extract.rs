// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The text in a piece of memory.

use super::Encoding;

/// The longest string that is printed as one, in characters.
pub(super) const MAX_LEN: i64 = 4096;

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
    /// It may go on in the next piece.
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
/// all that touch an end of it. The byte behind them is there too, unless memory ends.
pub(super) fn extract(start: u64, memory: &[u8], len: usize, min: usize) -> Vec<Fragment> {
    let mut fragments = Vec::new();
    for stream in Stream::ALL {
        let step = if stream == Stream::Bytes { 1 } else { 2 };
        let first = match stream {
            Stream::Bytes => 0,
            Stream::Even => usize::from(!start.is_multiple_of(2)),
            Stream::Odd => usize::from(start.is_multiple_of(2)),
        };
        let is_character = |at: usize| {
            memory.get(at).is_some_and(|byte| is_text(*byte))
                && (step == 1 || memory.get(at + 1) == Some(&0))
        };
        let mut at = first;
        while at < len {
            let mut end = at;
            while end < len && is_character(end) {
                end += step;
            }
            let (is_begun, goes_on) = (at == first, end >= len);
            if end > at && ((end - at) / step >= min || is_begun || goes_on) {
                let text = memory.iter().skip(at).take(end - at).step_by(step).copied().collect();
                fragments.push(Fragment {
                    start: start + at as u64,
                    stream,
                    text,
                    is_begun,
                    goes_on,
                });
            }
            // What is at the end is no text.
            at = end + step;
        }
    }
    fragments
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
        // The last byte lies behind the piece.
        assert_eq!(ends, [(Stream::Bytes, true, false), (Stream::Even, true, false)]);
        let found = extract(0x1001, b"xa\0", 2, 4);
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[1].stream, found[1].start, found[1].goes_on),
            (Stream::Even, 0x1002, true)
        );
    }
}

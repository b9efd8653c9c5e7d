// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Strings that lie in several pieces are put together, and all come in the order of their
//! addresses.

use super::extract::{Fragment, MAX_LEN, Stream};
use super::text::Text;
use crate::range::GpaRange;

/// Puts strings together.
pub(super) struct Collector {
    min: usize,
    /// End of the piece before.
    end: u64,
    /// The string of each stream that may continue in the next piece.
    open: [Option<Open>; 3],
    /// Strings that wait for one before them to end.
    waiting: Vec<Text>,
}

/// A string that has not ended.
struct Open {
    start: u64,
    text: Vec<u8>,
    /// It is the rest of a longer one.
    is_rest: bool,
}

impl Collector {
    /// Collects strings of at least `min` characters.
    pub(super) fn new(min: usize) -> Self {
        Self { min, end: 0, open: [None, None, None], waiting: Vec::new() }
    }

    /// Takes what is in the next piece; returns the strings for which it is clear that none comes
    /// before them.
    pub(super) fn add(&mut self, piece: GpaRange, fragments: Vec<Fragment>) -> Vec<Text> {
        if piece.start != self.end {
            self.close();
        }
        self.end = piece.end;
        let mut open = std::mem::take(&mut self.open);
        for fragment in fragments {
            let Fragment { start, stream, text, is_begun, goes_on } = fragment;
            let before = open.get_mut(stream as usize).and_then(Option::take);
            let mut string = Open { start, text, is_rest: false };
            match before {
                Some(mut before) if is_begun && before.end(stream) == string.start => {
                    before.text.append(&mut string.text);
                    string = before;
                }
                Some(before) => self.finish(before, stream),
                None => {}
            }
            self.cut(&mut string, stream);
            match self.open.get_mut(stream as usize).filter(|_| goes_on) {
                Some(place) => *place = Some(string),
                None => self.finish(string, stream),
            }
        }
        for (before, stream) in open.into_iter().zip(Stream::ALL) {
            let Some(before) = before else { continue };
            match self.open.get_mut(stream as usize) {
                // Its next character would begin after a piece of one byte.
                Some(place) if before.end(stream) >= piece.end => *place = Some(before),
                _ => self.finish(before, stream),
            }
        }
        let first = self.open.iter().flatten().map(|open| open.start).min();
        self.ready(first.unwrap_or(u64::MAX))
    }

    /// The strings that are left.
    pub(super) fn end(mut self) -> Vec<Text> {
        self.close();
        self.ready(u64::MAX)
    }

    fn close(&mut self) {
        let open = std::mem::take(&mut self.open);
        for (open, stream) in open.into_iter().zip(Stream::ALL) {
            if let Some(open) = open {
                self.finish(open, stream);
            }
        }
    }

    /// The strings that begin before `limit`.
    fn ready(&mut self, limit: u64) -> Vec<Text> {
        self.waiting.sort_unstable();
        let count = self.waiting.partition_point(|text| text.at < limit);
        self.waiting.drain(..count).collect()
    }

    /// Takes off the parts of a long string that are full.
    fn cut(&mut self, string: &mut Open, stream: Stream) {
        let max = usize::from(MAX_LEN);
        while string.text.len() > max {
            let rest = string.text.split_off(max);
            let start = string.end(stream);
            let part = std::mem::replace(string, Open { start, text: rest, is_rest: true });
            self.finish(part, stream);
        }
    }

    fn finish(&mut self, string: Open, stream: Stream) {
        if string.text.len() >= self.min || string.is_rest {
            // Printable ASCII, so that nothing is replaced.
            let text = String::from_utf8(string.text).unwrap_or_default();
            self.waiting.push(Text { at: string.start, encoding: stream.encoding(), text });
        }
    }
}

impl Open {
    fn end(&self, stream: Stream) -> u64 {
        self.start + self.text.len() as u64 * stream.width()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::extract::extract;
    use super::super::text::Encoding;
    use super::*;

    /// The strings of memory that is taken in pieces with these ends.
    fn strings(memory: &[u8], ends: &[usize], min: usize) -> Vec<Text> {
        let (mut collector, mut all, mut from) = (Collector::new(min), Vec::new(), 0);
        for end in ends.iter().copied().chain([memory.len()]).map(|end| end.min(memory.len())) {
            if from < end {
                let start = 0x1000 + from as u64;
                let part = &memory[from..memory.len().min(end + 1)];
                let piece = start..0x1000 + end as u64;
                all.extend(collector.add(piece, extract(start, part, end - from, min)));
                from = end;
            }
        }
        all.extend(collector.end());
        all
    }

    #[test]
    fn long_strings_come_in_parts() {
        let memory = [&[b'a'; 5000][..], b"\0b\0c\0d\0"].concat();
        let found = strings(&memory, &[3000, 4500], 3);
        let found: Vec<_> =
            found.iter().map(|text| (text.at, text.encoding, text.text.len())).collect();
        // The last of the letters is a character of two bytes as well.
        let wide = (0x1000 + 4999, Encoding::Utf16, 4);
        assert_eq!(found, [(0x1000, Encoding::Ascii, 4096), (0x2000, Encoding::Ascii, 904), wide]);
    }

    #[test]
    fn a_piece_of_one_byte_ends_no_wide_string() {
        let found = strings(b"\0a\0a\0a\0", &[4, 5], 3);
        let found: Vec<_> = found.iter().map(|text| (text.at, &*text.text)).collect();
        assert_eq!(found, [(0x1001, "aaa")]);
    }

    #[test]
    fn a_hole_ends_strings() {
        let mut collector = Collector::new(4);
        let first = extract(0, b"abcd", 4, 4);
        assert_eq!(collector.add(0..4, first), []);
        let found = collector.add(0x1000..0x1004, extract(0x1000, b"efgh", 4, 4));
        assert_eq!(found.iter().map(|text| &*text.text).collect::<Vec<_>>(), ["abcd"]);
        assert_eq!(collector.end().iter().map(|text| &*text.text).collect::<Vec<_>>(), ["efgh"]);
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            memory in proptest::collection::vec(proptest::sample::select(vec![0u8, 0, b'a', b'b', 0xff]), 0..200),
            mut ends in proptest::collection::vec(0usize..200, 0..5),
            min in 1usize..5,
        ) {
            ends.sort_unstable();
            let whole = strings(&memory, &[], min);
            prop_assert!(whole.is_sorted());
            prop_assert_eq!(strings(&memory, &ends, min), whole);
        }
    }
}

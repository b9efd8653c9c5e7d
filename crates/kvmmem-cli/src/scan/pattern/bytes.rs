// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bytes, with bits that may be anything.

use std::ops::Range;

use kvmmem::search::{MaskedByte, PLACES, Probe};

/// The longest pattern in bytes, and the longest match of a regular expression.
pub(super) const MAX_LEN: usize = 4096;

/// The [`commonness`] of a byte that matches anything.
const ANY: u32 = u32::MAX;

/// Bits that differ between an ASCII letter's cases.
const CASE: u8 = 0x20;

/// Bytes of a key, at least and at most.
const MIN_KEY: usize = 2;
const KEY: usize = 8;

#[derive(Clone, Debug)]
pub(super) struct Bytes {
    bytes: Vec<MaskedByte>,
    /// The rarest three bytes, which find candidates.
    probe: Probe,
    /// Place of the first one.
    anchor: usize,
}

impl Bytes {
    /// Reads pairs of hexadecimal digits, with `?` for any digit; blanks may stand between them.
    pub(super) fn from_hex(text: &str) -> Result<Self, String> {
        const FORM: &str = "write bytes as pairs of hexadecimal digits, ? for any digit, for example 4889e5??c3 or 4?8b; for text, give --text";
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b' ').collect();
        let (pairs, rest) = digits.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(FORM.into());
        }
        let digit = |character: u8| match character {
            b'?' => Some((0, 0)),
            digit => Some((u8::try_from(char::from(digit).to_digit(16)?).ok()?, 0xf)),
        };
        let byte = |[high, low]: &[u8; 2]| {
            let ((high, high_mask), (low, low_mask)) = (digit(*high)?, digit(*low)?);
            Some(MaskedByte { value: high << 4 | low, mask: high_mask << 4 | low_mask })
        };
        let bytes: Option<Vec<MaskedByte>> = pairs.iter().map(byte).collect();
        Self::new(bytes.ok_or(FORM)?)
    }

    /// The bytes of a text; ASCII letters in both cases if `ignores_case`.
    pub(super) fn from_text(
        bytes: impl Iterator<Item = u8>,
        ignores_case: bool,
    ) -> Result<Self, String> {
        let mask = |byte: u8| if ignores_case && byte.is_ascii_alphabetic() { !CASE } else { 0xff };
        Self::new(
            bytes.map(|byte| MaskedByte { value: byte & mask(byte), mask: mask(byte) }).collect(),
        )
    }

    fn new(bytes: Vec<MaskedByte>) -> Result<Self, String> {
        if bytes.len() > MAX_LEN {
            return Err(format!(
                "the pattern has {} bytes, at most {MAX_LEN} are taken",
                bytes.len()
            ));
        }
        let (anchor, probe) = rarest(&bytes)
            .ok_or("the pattern is empty or matches anything: give at least one byte or digit")?;
        Ok(Self { bytes, probe, anchor })
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn probe(&self) -> (&Probe, usize) {
        (&self.probe, self.anchor)
    }

    /// The places among `starts` where the pattern begins and fits; they may overlap.
    pub(super) fn find<'a>(
        &'a self,
        memory: &'a [u8],
        starts: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + 'a {
        let end = starts.end.min((memory.len() + 1).saturating_sub(self.len()));
        // What the probe may take in when the pattern begins before the end.
        let within = memory
            .get(..(end + self.anchor + self.probe.reach()).min(memory.len()))
            .unwrap_or_default();
        let mut from = starts.start + self.anchor;
        let blocks = std::iter::from_fn(move || {
            let block = self.probe.find(within, from)?;
            from = usize::try_from(block.at).ok()? + PLACES;
            Some(block)
        });
        blocks.flat_map(|block| block.iter()).filter_map(move |place| {
            let start = usize::try_from(place)
                .ok()?
                .checked_sub(self.anchor)
                .filter(|start| *start < end)?;
            self.at(memory, start)
        })
    }

    /// The match that begins at `start`, if there is one.
    pub(super) fn at(&self, memory: &[u8], start: usize) -> Option<Range<usize>> {
        let found = start..start + self.len();
        self.matches(memory.get(found.clone())?).then_some(found)
    }

    /// Up to [`KEY`] bytes in a row, and the place of the first. They are the rarest ones that are
    /// fixed but for the case of letters.
    pub(super) fn key(&self) -> Option<(usize, Vec<u8>)> {
        let byte = |byte: &MaskedByte| match byte.mask {
            0xff => Some(byte.value.to_ascii_lowercase()),
            mask if mask == !CASE => Some(byte.value | CASE).filter(u8::is_ascii_lowercase),
            _ => None,
        };
        let run = |start: usize| -> Vec<u8> {
            let bytes = self.bytes.iter().skip(start).take(KEY);
            bytes.map_while(byte).collect()
        };
        // Of a run as long as any, no byte may be anything.
        let common = |start: usize, len: usize| -> u32 {
            self.bytes.iter().skip(start).take(len).map(|byte| commonness(*byte)).sum()
        };
        let runs = (0..self.len()).map(|start| (start, run(start)));
        let runs = runs.filter(|(_, run)| run.len() >= MIN_KEY);
        runs.min_by_key(|(start, run)| (std::cmp::Reverse(run.len()), common(*start, run.len())))
    }

    fn matches(&self, memory: &[u8]) -> bool {
        self.bytes
            .iter()
            .zip(memory)
            .all(|(wanted, byte)| byte & wanted.mask == wanted.value & wanted.mask)
    }
}

/// The three bytes that memory holds least, and the first one's place. Where there are fewer, some
/// are there again.
fn rarest(bytes: &[MaskedByte]) -> Option<(usize, Probe)> {
    let rank = |(place, byte): &(usize, &MaskedByte)| (commonness(**byte), *place);
    let (first, _) =
        bytes.iter().enumerate().min_by_key(rank).filter(|(_, byte)| byte.mask != 0)?;
    // A distance can express the places of all three.
    let from = first.saturating_sub(usize::from(u8::MAX) / 2);
    let near = bytes.iter().enumerate().skip(from).take(usize::from(u8::MAX));
    let mut near: Vec<(usize, &MaskedByte)> = near.filter(|(_, byte)| byte.mask != 0).collect();
    near.sort_unstable_by_key(rank);
    near.truncate(3);
    near.sort_unstable_by_key(|(place, _)| *place);
    let [first, .., last] = near[..] else { return single(near.first()?) };
    let middle = near.get(near.len() / 2)?;
    let at =
        |(place, byte): (usize, &MaskedByte)| Some((*byte, u8::try_from(place - first.0).ok()?));
    Some((first.0, Probe::new(*first.1, at(*middle)?, at(last)?)?))
}

fn single((place, byte): &(usize, &MaskedByte)) -> Option<(usize, Probe)> {
    Some((*place, Probe::new(**byte, (**byte, 0), (**byte, 0))?))
}

/// How often memory holds such bytes, roughly: zeros most of all, then text and what is frequent in
/// code.
fn commonness(byte: MaskedByte) -> u32 {
    if byte.mask == 0 {
        return ANY;
    }
    let often = match byte.value {
        0x00 => 40,
        0xff => 16,
        b' ' | b'_' | b'e' | 0x48 | 0x8b | 0x89 => 8,
        b'a'..=b'z' | 0x01..=0x10 | 0xe8 | 0x24 => 4,
        b'A'..=b'Z' | b'0'..=b'9' | 0x20..=0x2f => 3,
        _ => 1,
    };
    // Each bit that does not count doubles it.
    often << byte.mask.count_zeros()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find(pattern: Result<Bytes, String>, memory: &[u8]) -> Vec<usize> {
        pattern.unwrap().find(memory, 0..memory.len()).map(|found| found.start).collect()
    }

    #[test]
    fn patterns_are_read() {
        assert_eq!(
            find(Bytes::from_hex("48 89 ?? c3"), b"\x48\x89\xe5\xc3\x48\x89\xc3\xc3\xff"),
            [0, 4]
        );
        assert_eq!(find(Bytes::from_hex("??aa"), b"\xaa\xaa\xaa"), [0, 1]);
        assert_eq!(find(Bytes::from_hex("AA????"), b"\xaa\xaa\xaa\xaa"), [0, 1]);
        assert_eq!(find(Bytes::from_hex("4? ?f"), b"\x4f\x4f\x0f\x1f\x40\x3f\x4f\x40"), [0, 1, 4]);
        assert_eq!(find(Bytes::from_hex("4?"), b"\x3f\x40\x4f\x50"), [1, 2]);
        assert_eq!(find(Bytes::from_text(b"aa".iter().copied(), false), b"aaaa"), [0, 1, 2]);
        for text in ["", "4", "??", "????", "zz", "+1", "ä", "0x12"] {
            assert!(Bytes::from_hex(text).is_err(), "{text}");
        }
        assert!(Bytes::from_text(std::iter::empty(), false).is_err());
        let long = std::iter::repeat_n(b'a', MAX_LEN + 1);
        assert!(Bytes::from_text(long, false).unwrap_err().contains("4097"));
    }

    #[test]
    fn the_probe_is_within_reach_in_long_patterns() {
        for rare in [0, 100, 300, 599] {
            let mut text = vec![b'e'; 600];
            text[rare] = 0x9e;
            let pattern = Bytes::from_text(text.iter().copied(), false);
            let memory = [&[b'e'; 700][..], &text, &[0; 10]].concat();
            assert_eq!(find(pattern, &memory), [700], "{rare}");
        }
    }

    proptest! {
        #[test]
        fn the_places_are_those_of_a_plain_search(
            // Few letters, so that there are matches, and matches that overlap.
            bytes in proptest::collection::vec((0u8..2, proptest::sample::select(vec![0u8, 1, 0xff, 0xfe])), 1..6),
            memory in proptest::collection::vec(0u8..2, 0..200),
            from in 0usize..80,
            count in 0usize..200,
        ) {
            let bytes: Vec<MaskedByte> = bytes.iter().map(|(value, mask)| MaskedByte { value: *value, mask: *mask }).collect();
            let starts = from..from + count;
            if let Ok(pattern) = Bytes::new(bytes.clone()) {
                let plain: Vec<usize> = memory
                    .windows(bytes.len())
                    .enumerate()
                    .filter(|(_, part)| bytes.iter().zip(*part).all(|(b, p)| (b.value ^ p) & b.mask == 0))
                    .map(|(at, _)| at)
                    .filter(|at| starts.contains(at))
                    .collect();
                let found: Vec<usize> = pattern.find(&memory, starts).map(|found| found.start).collect();
                prop_assert_eq!(found, plain);
            } else {
                prop_assert!(bytes.iter().all(|byte| byte.mask == 0));
            }
        }
    }
}

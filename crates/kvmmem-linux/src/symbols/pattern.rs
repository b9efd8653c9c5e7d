// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the tables of kallsyms by their form: for kernels before 6.0, whose note lacks their
//! addresses, and for kernels without a note.
//!
//! The tokens of the ten digits follow each other in kallsyms_token_table, as each digit stands for
//! itself. From there on all else has its place (`write_src` in `scripts/kallsyms.c`): tokens,
//! their index, and before them markers, names and the number of names. Offsets and their base lie
//! before that number, or from 6.2 on after the index.

use super::error::TableError;
use super::index::Symbols;
use super::names::{MAX_TOKEN_BYTES, Names, next_name};
use super::tables::{Addresses, INDEX_BYTES, Tables, read_some};
use crate::space::Space;
use kvmmem_memory::PAGE_SIZE;
use kvmmem_memory::paging::WalkError;

/// The tokens of '0' to '9'.
const DIGITS: &[u8; 20] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";

/// The token of '0' comes after those of all smaller bytes.
const BEFORE_DIGITS: usize = 48;

/// The most bytes of the tokens before that of '0'.
const MAX_BEFORE: u64 = 1 << 12;

/// Bytes in which the image may lie (KERNEL_IMAGE_SIZE).
const IMAGE: u64 = 1 << 30;

/// Bytes that are read at a time, and at which an image is aligned.
const STEP: u64 = 2 << 20;

/// The most bytes of names and markers.
const MAX_BACK: u64 = 16 << 20;

/// How many names have one marker.
const MARKED: usize = 256;

/// Bytes that 256 names can take: each has two at least, and seldom more than 40.
const MARKED_BYTES: std::ops::Range<usize> = 2 * MARKED..256 * MARKED;

/// The least markers of a table.
const MIN_MARKERS: usize = 8;

/// The most places that are looked at in search of the right ones.
const MAX_PLACES: usize = 64;
const MAX_MARKERS: usize = 64;
const MAX_PARSED: usize = 1 << 25;

/// Reads the tables that look like some, in an image that begins at or after `start`, and whose
/// addresses fit.
pub(super) fn read(
    space: &Space<'_>,
    start: u64,
    fits: &dyn Fn(&Addresses<'_>) -> bool,
) -> Result<Symbols, TableError> {
    let mut budget = Budget { markers: MAX_MARKERS, names: MAX_PARSED };
    let mut result = Err(TableError::NotFound);
    for digits in places(space, start - start % STEP) {
        let Some(tokens) = tokens(space, digits) else { continue };
        match names(space, fits, tokens, &mut budget) {
            Ok(Some(symbols)) => return Ok(symbols),
            Ok(None) => {}
            Err(error) => result = Err(error),
        }
    }
    result
}

/// Where the digits are.
fn places(space: &Space<'_>, start: u64) -> Vec<u64> {
    let mut places = Vec::new();
    let (mut at, end) = (start, start.saturating_add(IMAGE));
    while at < end && places.len() < MAX_PLACES {
        // Parts of the image are not mapped: they were freed, or have other permissions.
        if let Err(error) = space.translate(at) {
            let span = match error {
                WalkError::NotPresent { entry, .. } => 1 << (12 + 9 * u64::from(entry.level - 1)),
                _ => PAGE_SIZE as u64,
            };
            at = (at - at % span).saturating_add(span);
            continue;
        }
        let len = usize::try_from(STEP - at % STEP).unwrap_or(PAGE_SIZE) + DIGITS.len();
        let bytes = read_some(space, at, len).unwrap_or_default();
        places.extend(memchr::memmem::find_iter(&bytes, DIGITS).map(|offset| at + offset as u64));
        at = if bytes.len() == len {
            at.saturating_add((len - DIGITS.len()) as u64)
        } else {
            // There may be no address after the last that was read.
            let next = at.saturating_add((bytes.len() as u64).max(1));
            match next.checked_next_multiple_of(PAGE_SIZE as u64) {
                Some(next) => next,
                None => break,
            }
        };
    }
    places.dedup();
    places.truncate(MAX_PLACES);
    places
}

/// Addresses of the table of tokens and of the index after it, around the digits.
fn tokens(space: &Space<'_>, digits: u64) -> Option<(u64, u64)> {
    let before = read_back(space, digits, MAX_BEFORE);
    let mut ends = memchr::memrchr_iter(0, &before);
    // The end of what lies before the first token.
    let start = ends.nth(BEFORE_DIGITS)? + 1;
    let table = digits - (before.len() - start) as u64;
    let bytes = read_some(space, table, MAX_TOKEN_BYTES)?;
    let (mut starts, mut end) = (Vec::with_capacity(INDEX_BYTES), 0);
    for _ in 0..INDEX_BYTES / 2 {
        starts.extend(u16::try_from(end).ok()?.to_le_bytes());
        end += memchr::memchr(0, bytes.get(end..)?)? + 1;
    }
    // Tables may end at the last address.
    let end = table.checked_add(end as u64)?;
    let mut indices = [4, 8].into_iter().filter_map(|align| end.checked_next_multiple_of(align));
    let index = indices
        .find(|gva| read_some(space, *gva, INDEX_BYTES).is_some_and(|index| index == starts))?;
    Some((table, index))
}

/// The symbols whose names lie before the tokens.
fn names(
    space: &Space<'_>,
    fits: &dyn Fn(&Addresses<'_>) -> bool,
    (token_table, token_index): (u64, u64),
    budget: &mut Budget,
) -> Result<Option<Symbols>, TableError> {
    let bytes = read_back(space, token_table, MAX_BACK);
    let first = token_table - bytes.len() as u64;
    // The nearest markers first: what is between belongs to these tables.
    let places = (0..bytes.len()).rev().filter(|place| (first + *place as u64).is_multiple_of(4));
    for place in places {
        let Some(markers) = Markers::at(&bytes, place) else { continue };
        if !budget.take_markers() {
            return Err(TableError::NotFound);
        }
        let Some((number, begin, count)) = markers.names(&bytes, budget) else { continue };
        let (names, offsets) = (first + begin as u64, 0);
        let tables = Tables { count, names, token_table, token_index, offsets, base: None };
        let mut rest = bytes.get(begin..).map(<[u8]>::to_vec);
        let names = Names::read(count, tables.tokens(space)?, |_| rest.take())?;
        let mut symbols = Symbols::new(names);
        for tables in tables.with_offsets(first + number as u64) {
            if let Ok(addresses) = tables.addresses(space, fits, &symbols) {
                symbols.addresses = addresses;
                return Ok(Some(symbols));
            }
        }
        return Err(TableError::Addresses);
    }
    Ok(None)
}

/// What is left to be looked at. A guest can fill its image with what looks like tables.
struct Budget {
    markers: usize,
    names: usize,
}

impl Budget {
    fn take_markers(&mut self) -> bool {
        self.markers = self.markers.saturating_sub(1);
        self.markers > 0
    }
}

/// A table of markers: where the first name is, the name with number 256, 512 and so on, in bytes
/// from the first.
struct Markers<'a> {
    words: &'a [[u8; 4]],
    place: usize,
}

impl<'a> Markers<'a> {
    /// The table that begins at `place`, if one does.
    fn at(bytes: &'a [u8], place: usize) -> Option<Self> {
        let (words, _) = bytes.get(place..)?.as_chunks::<4>();
        let (first, second) =
            (u32::from_le_bytes(*words.first()?), u32::from_le_bytes(*words.get(1)?));
        // 0 may come before the table too.
        if first != 0 || second == 0 {
            return None;
        }
        let steps = words.iter().zip(words.iter().skip(1)).map(|(from, to)| {
            u32::from_le_bytes(*to).saturating_sub(u32::from_le_bytes(*from)) as usize
        });
        let len = 1 + steps.take_while(|step| MARKED_BYTES.contains(step)).count();
        (len >= MIN_MARKERS).then(|| Self { words: words.get(..len).unwrap_or_default(), place })
    }

    /// Where the number of names is, where the names begin and how many there are.
    fn names(&self, bytes: &[u8], budget: &mut Budget) -> Option<(usize, usize, u32)> {
        let places = (0..self.place).rev().filter(|number| (self.place - number).is_multiple_of(4));
        let numbers = places.filter_map(|number| {
            let word = bytes.get(number..)?.first_chunk()?;
            Some((number, u32::from_le_bytes(*word)))
        });
        for (number, count) in numbers {
            let last = (count as usize)
                .div_ceil(MARKED)
                .checked_sub(1)
                .and_then(|last| self.words.get(last));
            let Some(last) = last.map(|word| u32::from_le_bytes(*word) as usize) else { continue };
            for gap in [8, 4] {
                // From the last marker on there are at most 256 names.
                let tail = self.place.checked_sub(number + gap + last);
                if count as usize > MARKED
                    && tail.is_some_and(|tail| (2..=MARKED_BYTES.end + 8).contains(&tail))
                    && self.follow(bytes, number + gap, count as usize, budget)
                {
                    return Some((number, number + gap, count));
                }
            }
        }
        None
    }

    /// Whether so many names begin there, and end before the markers.
    fn follow(&self, bytes: &[u8], begin: usize, count: usize, budget: &mut Budget) -> bool {
        let mut at = begin;
        for index in 0..count {
            let marker =
                self.words.get(index / MARKED).map(|word| u32::from_le_bytes(*word) as usize);
            let is_marked = !index.is_multiple_of(MARKED) || marker == Some(at - begin);
            budget.names = budget.names.saturating_sub(1);
            match next_name(bytes, at) {
                Some((start, len)) if len > 0 && is_marked && budget.names > 0 => {
                    at = start + usize::from(len)
                }
                _ => return false,
            }
        }
        at <= self.place && self.place - at < 8
    }
}

impl Tables {
    /// The tables with the places at which kernels have offsets; `number` is where the number of
    /// names is.
    fn with_offsets(self, number: u64) -> impl Iterator<Item = Self> {
        let bytes = 4 * u64::from(self.count);
        let before = number.saturating_sub(8);
        let after = self.token_index.checked_add(INDEX_BYTES as u64);
        let base = after.and_then(|after| after.checked_add(bytes)?.checked_next_multiple_of(8));
        let offsets = before.saturating_sub(bytes.next_multiple_of(8));
        [
            Some(Self { offsets, base: Some(before), ..self }),
            after.zip(base).map(|(offsets, base)| Self { offsets, base: Some(base), ..self }),
            after.map(|offsets| Self { offsets, base: None, ..self }),
        ]
        .into_iter()
        .flatten()
    }
}

/// Reads up to `len` bytes before `end`, as far as they can be read.
fn read_back(space: &Space<'_>, end: u64, len: u64) -> Vec<u8> {
    let mut parts = Vec::new();
    let (mut at, limit) = (end, end.saturating_sub(len));
    while at > limit {
        // To the begin of a page, or of 64 KiB.
        let start = (at - 1) & !0xffff;
        let start = start.max(limit);
        let wanted = usize::try_from(at - start).unwrap_or(0);
        let part = read_some(space, start, wanted).unwrap_or_default();
        let is_whole = part.len() == wanted;
        if !is_whole {
            break;
        }
        parts.push(part);
        at = start;
    }
    parts.into_iter().rev().flatten().collect()
}

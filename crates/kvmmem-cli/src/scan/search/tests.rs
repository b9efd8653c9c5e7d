// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Searches by copies and in place, against a plain one.

use std::slice::from_ref;
use std::sync::atomic::{AtomicU64, Ordering};

use kvmmem::search::{Candidates, Probe};

use proptest::prelude::*;

use super::super::pattern::Form;
use super::*;

/// Of memory that is not mapped; a multiple of it is not.
const PIECE: u64 = 256 << 10;
use crate::range::GpaRange;

fn pattern(form: Form, text: &str) -> Pattern {
    Pattern::new(form, text, false).unwrap()
}

/// Memory that is searched in place. It is never asked for parts without data.
struct InPlace<R>(R);

impl<R: Fn(u64, &mut [u8]) -> Result<()> + Sync> Source for InPlace<R> {
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<()> {
        (self.0)(gpa, buffer)
    }

    fn find(&self, probe: &Probe, gpa: u64, places: u64) -> Option<Option<Candidates>> {
        let mut copy = vec![0; usize::try_from(places).unwrap() + probe.reach()];
        (self.0)(gpa, &mut copy).unwrap();
        Some(probe.find(&copy, 0).map(|found| Candidates { at: found.at + gpa, ..found }))
    }
}

/// Searches memory with the bytes of `at`, by copies and in place.
fn search(search: &Search<'_>, at: impl Fn(u64) -> u8 + Sync) -> Vec<(u64, usize)> {
    let read = |gpa: u64, buffer: &mut [u8]| {
        let end = gpa + buffer.len() as u64;
        assert!(
            search.places.data.iter().any(|part| part.start <= gpa && end <= part.end),
            "{gpa:#x} is no data"
        );
        buffer.iter_mut().zip(gpa..).for_each(|(byte, gpa)| *byte = at(gpa));
        Ok(())
    };
    let one = run(search, &read);
    let other = run(search, &InPlace(read));
    assert_eq!(one, other);
    one
}

fn run(search: &Search<'_>, source: &impl Source) -> Vec<(u64, usize)> {
    let (mut all, mut bytes) = (Vec::new(), 0);
    let count = search
        .run(source, |matches, more| {
            all.extend(matches.iter().map(|found| (found.gpa, found.pattern)));
            bytes += more;
            Ok(())
        })
        .unwrap();
    assert_eq!(count, all.len());
    if count < search.max {
        assert_eq!(bytes, crate::range::total(search.places.data));
    }
    all
}

#[test]
fn matches_across_pieces_and_parts_are_found_once() {
    let patterns = [pattern(Form::Text, "needle"), pattern(Form::Hex, "6565")];
    let size = 3 * PIECE;
    let places = [0, PIECE - 3, 2 * PIECE - 1, size - 6];
    let at = |gpa: u64| {
        let letter = |place: &u64| b"needle".get(usize::try_from(gpa.checked_sub(*place)?).ok()?);
        places.iter().find_map(letter).copied().unwrap_or(0)
    };
    let expected: Vec<(u64, usize)> =
        places.iter().flat_map(|place| [(*place, 0), (*place + 1, 1)]).collect();
    for threads in [1, 2, 5] {
        // In two parts that touch each other as well.
        for cut in [0, PIECE - 1, 2 * PIECE] {
            let data = [0..cut, cut..size];
            let data = &data[usize::from(cut == 0)..];
            let run = 0..size;
            let found = search(
                &Search {
                    max: 99,
                    threads,
                    ..Search::new(&patterns, Places { runs: from_ref(&run), data }).unwrap()
                },
                at,
            );
            assert_eq!(found, expected);
        }
    }
}

#[test]
fn the_first_ones_are_kept_and_the_rest_not_read() {
    let patterns = [pattern(Form::Hex, "00")];
    let range = 0..1 << 40;
    let asked = AtomicU64::new(0);
    let mut told = Vec::new();
    let search = Search {
        max: 10,
        threads: 2,
        ..Search::new(&patterns, Places { runs: from_ref(&range), data: from_ref(&range) }).unwrap()
    };
    let read = |gpa: u64, _: &mut [u8]| {
        asked.fetch_max(gpa, Ordering::Relaxed);
        Ok(())
    };
    search
        .run(&read, |matches, _| {
            told.extend(matches.iter().map(|found| found.gpa));
            Ok(())
        })
        .unwrap();
    assert_eq!(told, (0..10).collect::<Vec<u64>>());
    assert!(asked.into_inner() < 64 * BATCH.end());
}

#[test]
fn an_error_ends_the_search() {
    let patterns = [pattern(Form::Hex, "01")];
    let range = 0..1 << 40;
    let search = Search {
        threads: 3,
        ..Search::new(&patterns, Places { runs: from_ref(&range), data: from_ref(&range) }).unwrap()
    };
    let read = |gpa: u64, _: &mut [u8]| {
        anyhow::ensure!(gpa < 5 * PIECE, "lost");
        Ok(())
    };
    assert_eq!(search.run(&read, |_, _| Ok(())).unwrap_err().to_string(), "lost");
    let error =
        search.run(&|_: u64, _: &mut [u8]| Ok(()), |_, _| anyhow::bail!("no room")).unwrap_err();
    assert_eq!(error.to_string(), "no room");
}

#[test]
fn what_is_around_a_match_is_shown() {
    let patterns = [pattern(Form::Text, "needle"), pattern(Form::Regex, "[n]e+dl")];
    let run = 0x1000..0x3000;
    let at = |gpa: u64| {
        let within =
            |place: u64| b"needle".get(usize::try_from(gpa.checked_sub(place)?).ok()?).copied();
        within(0x1002).or_else(|| within(0x2ff8)).unwrap_or(b'.')
    };
    let read = |gpa: u64, buffer: &mut [u8]| {
        buffer.iter_mut().zip(gpa..).for_each(|(byte, gpa)| *byte = at(gpa));
        Ok(())
    };
    let shown = |before, after| {
        let search = Search {
            around: Around { before, after },
            max: 99,
            ..Search::new(&patterns, Places { runs: from_ref(&run), data: from_ref(&run) }).unwrap()
        };
        let mut all = Vec::new();
        let tell = |matches: &[Match], _| {
            all.extend(matches.iter().map(|found| {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                (found.gpa, found.len, text(found.before()), text(found.bytes()))
            }));
            Ok(())
        };
        search.run(&InPlace(read), tell).unwrap();
        all.into_iter()
            .map(|(gpa, len, before, bytes)| format!("{gpa:x} {len} {before}|{bytes}"))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        shown(0, 0),
        [
            "1002 6 |needle..........",
            "1002 5 |needle..........",
            "2ff8 6 |needle..",
            "2ff8 5 |needle..",
        ]
    );
    assert_eq!(
        shown(3, 1),
        ["1002 6 ..|needle.", "1002 5 ..|needle", "2ff8 6 ...|needle.", "2ff8 5 ...|needle"]
    );
}

#[test]
fn candidates_in_place_need_not_be_matches() {
    // Each place is a candidate, by far more than are copied one by one.
    let patterns = [pattern(Form::Hex, "aa bb aa bb cc"), pattern(Form::Hex, "aa bb aa bb dd")];
    let run = 0..2 * PIECE;
    let at = |gpa: u64| match gpa {
        gpa if gpa == PIECE + 4 => 0xcc,
        gpa if gpa == 3 * PIECE / 2 + 4 => 0xdd,
        gpa if gpa.is_multiple_of(2) => 0xaa,
        _ => 0xbb,
    };
    let given = Search {
        max: 99,
        ..Search::new(&patterns, Places { runs: from_ref(&run), data: from_ref(&run) }).unwrap()
    };
    assert_eq!(search(&given, at), [(PIECE, 0), (3 * PIECE / 2, 1)]);
}

proptest! {
    #[test]
    fn the_matches_are_those_of_a_plain_search(
        // Bytes, whether they are data, and whether they are memory at all.
        memory in proptest::collection::vec((0u8..2, proptest::bool::weighted(0.7), proptest::bool::weighted(0.9)), 0..80),
        texts in proptest::collection::vec("(00|01|\\?\\?){1,5}", 1..4),
        threads in 1usize..4,
    ) {
        let patterns: Vec<Pattern> = texts.iter().filter_map(|text| Pattern::new(Form::Hex, text, false).ok()).collect();
        let ranges = |holds: &dyn Fn(usize) -> bool| {
            let mut ranges: Vec<GpaRange> = Vec::new();
            for at in (0..memory.len()).filter(|at| holds(*at)) {
                let at = at as u64;
                match ranges.last_mut() {
                    Some(last) if last.end == at => last.end += 1,
                    _ => ranges.push(at..at + 1),
                }
            }
            ranges
        };
        let is_data = |at: usize| memory[at].1 && memory[at].2;
        let (runs, data) = (ranges(&|at| memory[at].2), ranges(&is_data));
        let byte = |at: usize| if is_data(at) { memory[at].0 } else { 0 };
        let mut plain = Vec::new();
        for start in 0..memory.len() {
            for (number, pattern) in patterns.iter().enumerate() {
                let place = start..start + pattern.len();
                let is_memory = place.end <= memory.len() && place.clone().all(|at| memory[at].2);
                if is_memory && place.clone().any(is_data) {
                    let bytes: Vec<u8> = place.map(byte).collect();
                    if pattern.find(&bytes, 0..1).next().is_some() {
                        plain.push((start as u64, number));
                    }
                }
            }
        }
        let given = Search { threads, ..Search::new(&patterns, Places { runs: &runs, data: &data }).unwrap() };
        prop_assert_eq!(search(&given, |gpa| memory[usize::try_from(gpa).unwrap()].0), plain);
    }
}

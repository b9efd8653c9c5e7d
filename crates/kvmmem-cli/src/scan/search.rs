// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The search itself: workers take pieces of memory in turn, and what they find comes out in the order of addresses.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use anyhow::Result;

use super::pattern::Pattern;
use super::places::{Piece, Places};

/// Bytes in which a worker looks for beginnings of matches at a time: a buffer that stays in a CPU's own cache.
const PIECE: u64 = 256 * 1024;

/// Pieces that a worker may be ahead of the output.
const AHEAD: usize = 2;

/// Bytes that are shown of a match's place.
const CONTEXT: usize = 16;

/// What to search.
pub(super) struct Search<'a> {
    pub(super) patterns: &'a [Pattern],
    pub(super) places: Places<'a>,
    /// At most this many matches.
    pub(super) max: usize,
    pub(super) threads: usize,
}

/// A match.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Match {
    /// Where it begins.
    pub(super) gpa: u64,
    /// Which of the patterns.
    pub(super) pattern: usize,
    /// The bytes at its beginning; fewer than 16 where the memory ends.
    pub(super) context: Box<[u8]>,
}

/// The matches of a piece and how many bytes of data it had.
struct Found {
    matches: Vec<Match>,
    bytes: u64,
}

impl Search<'_> {
    /// Searches; `read` fills a buffer with data of one of the parts. `tell` gets each piece's matches, in the order
    /// of addresses, and how many bytes of data that piece had. Returns how many matches there were.
    pub(super) fn run(
        &self,
        read: impl Fn(u64, &mut [u8]) -> Result<()> + Sync,
        mut tell: impl FnMut(&[Match], u64) -> Result<()>,
    ) -> Result<usize> {
        std::thread::scope(|scope| {
            let workers: Vec<Receiver<Result<Found>>> = (0..self.threads)
                .map(|number| {
                    let (sender, receiver) = sync_channel(AHEAD);
                    let read = &read;
                    scope.spawn(move || self.work(number, read, &sender));
                    receiver
                })
                .collect();
            let mut count = 0;
            // The first worker without a further piece ends the turns: the others have none either. Those that are
            // still at work when this returns see that nobody listens.
            for found in workers.iter().cycle().map_while(|worker| worker.recv().ok()) {
                let Found { matches, bytes } = found?;
                let matches = matches.get(..self.max - count).unwrap_or(&matches);
                count += matches.len();
                tell(matches, bytes)?;
                if count == self.max {
                    break;
                }
            }
            drop(workers);
            Ok(count)
        })
    }

    fn work(
        &self,
        number: usize,
        read: &impl Fn(u64, &mut [u8]) -> Result<()>,
        sender: &SyncSender<Result<Found>>,
    ) {
        let mut buffer = Vec::new();
        for piece in self.places.pieces(self.reach(), PIECE).skip(number).step_by(self.threads) {
            let found = self.search(&piece, read, &mut buffer);
            let is_over = found.is_err();
            if sender.send(found).is_err() || is_over {
                return;
            }
        }
    }

    fn search(
        &self,
        piece: &Piece,
        read: impl Fn(u64, &mut [u8]) -> Result<()>,
        buffer: &mut Vec<u8>,
    ) -> Result<Found> {
        let Piece { starts, data, limit } = piece;
        let end = starts.end.saturating_add(self.reach().max(CONTEXT as u64)).min(*limit);
        buffer.resize(usize::try_from(end - starts.start)?, 0);
        self.places.fill(starts.start, buffer, read)?;
        let mut matches = Vec::new();
        for (number, pattern) in self.patterns.iter().enumerate() {
            let places = pattern
                .find(buffer)
                .map(|place| (place, starts.start + place as u64))
                .take_while(|(_, gpa)| *gpa < starts.end)
                .filter(|(_, gpa)| gpa + pattern.len() as u64 > *data);
            matches.extend(places.take(self.max).map(|(place, gpa)| {
                let context = buffer.iter().skip(place).take(CONTEXT).copied().collect();
                Match { gpa, pattern: number, context }
            }));
        }
        matches.sort_unstable();
        Ok(Found { matches, bytes: starts.end - starts.start.max(*data) })
    }

    /// How far the longest pattern reaches beyond its first byte.
    fn reach(&self) -> u64 {
        self.patterns.iter().map(|pattern| pattern.len() as u64 - 1).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::range::GpaRange;

    /// Searches memory that `at` tells byte by byte.
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
        let (mut all, mut bytes) = (Vec::new(), 0);
        let count = search
            .run(read, |matches, more| {
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
        let patterns = [Pattern::from_text("needle").unwrap(), Pattern::from_hex("6565").unwrap()];
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
                        patterns: &patterns,
                        places: Places { runs: from_ref(&run), data },
                        max: 99,
                        threads,
                    },
                    at,
                );
                assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn the_first_ones_are_kept_and_the_rest_not_read() {
        let patterns = [Pattern::from_hex("00").unwrap()];
        let range = 0..1 << 40;
        let asked = AtomicU64::new(0);
        let mut told = Vec::new();
        let search = Search {
            patterns: &patterns,
            places: Places { runs: from_ref(&range), data: from_ref(&range) },
            max: 10,
            threads: 2,
        };
        let read = |gpa: u64, _: &mut [u8]| {
            asked.fetch_max(gpa, Ordering::Relaxed);
            Ok(())
        };
        search
            .run(read, |matches, _| {
                told.extend(matches.iter().map(|found| found.gpa));
                Ok(())
            })
            .unwrap();
        assert_eq!(told, (0..10).collect::<Vec<u64>>());
        assert!(asked.into_inner() < 64 * PIECE);
    }

    #[test]
    fn an_error_ends_the_search() {
        let patterns = [Pattern::from_hex("01").unwrap()];
        let range = 0..1 << 40;
        let search = Search {
            patterns: &patterns,
            places: Places { runs: from_ref(&range), data: from_ref(&range) },
            max: usize::MAX,
            threads: 3,
        };
        let read = |gpa: u64, _: &mut [u8]| {
            anyhow::ensure!(gpa < 5 * PIECE, "lost");
            Ok(())
        };
        assert_eq!(search.run(read, |_, _| Ok(())).unwrap_err().to_string(), "lost");
        let error = search.run(|_, _| Ok(()), |_, _| anyhow::bail!("no room")).unwrap_err();
        assert_eq!(error.to_string(), "no room");
    }

    proptest! {
        #[test]
        fn the_matches_are_those_of_a_plain_search(
            // Bytes, whether they are data, and whether they are memory at all.
            memory in proptest::collection::vec((0u8..2, proptest::bool::weighted(0.7), proptest::bool::weighted(0.9)), 0..80),
            texts in proptest::collection::vec("(00|01|\\?\\?){1,5}", 1..4),
            threads in 1usize..4,
        ) {
            let patterns: Vec<Pattern> = texts.iter().filter_map(|text| Pattern::from_hex(text).ok()).collect();
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
                        if pattern.find(&bytes).next().is_some() {
                            plain.push((start as u64, number));
                        }
                    }
                }
            }
            let given = Search {
                patterns: &patterns,
                places: Places { runs: &runs, data: &data },
                max: usize::MAX,
                threads,
            };
            prop_assert_eq!(search(&given, |gpa| memory[usize::try_from(gpa).unwrap()].0), plain);
        }
    }
}

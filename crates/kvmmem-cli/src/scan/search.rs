// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The search itself. Memory that is mapped is looked at in place, and only what may be a match is
//! copied and compared; other memory is copied piece by piece. A target changes its memory
//! meanwhile: a match is what a copy held.

use std::ops::{ControlFlow, Range, RangeInclusive};
use std::sync::Arc;

use anyhow::Result;
use kvmmem::search::PLACES;

use super::many::Many;
use super::matches::{Around, Match};
use super::pattern::Pattern;
use super::places::{Piece, Places};
use super::source::Source;
use crate::parallel::{Sink, in_order};
use crate::range::{GpaRange, total};

/// Bytes that a thread takes at a time: so many that threads seldom meet, and so few that all end
/// together.
const BATCH: RangeInclusive<u64> = 1 << 20..=32 << 20;

/// Batches for each thread.
const BATCHES: u64 = 16;

/// Bytes for which a block of candidates is as good as a copy of them all: where there are more,
/// the rest is copied.
const DENSE: u64 = 1024;

/// Matches that are passed on together.
const TOGETHER: usize = 1024;

/// Bytes that are shown of a match's place.
const SHOWN: u64 = 16;

/// What to search.
pub(super) struct Search<'a> {
    pub(super) patterns: &'a [Pattern],
    /// Where there are many patterns, the automaton for them.
    many: Option<Many>,
    /// How far the longest match reaches beyond its first byte.
    reach: u64,
    pub(super) places: Places<'a>,
    pub(super) around: Around,
    /// At most this many matches.
    pub(super) max: usize,
    pub(super) threads: usize,
}

/// The matches of a piece and how many bytes of data it had.
struct PieceMatches {
    matches: Vec<Match>,
    bytes: u64,
}

/// A copy of memory.
#[derive(Default)]
struct Copy {
    start: u64,
    bytes: Vec<u8>,
}

impl<'a> Search<'a> {
    /// A search for all matches by one thread.
    pub(super) fn new(patterns: &'a [Pattern], places: Places<'a>) -> Result<Self> {
        let reach = patterns.iter().map(|pattern| pattern.len() as u64 - 1).max().unwrap_or(0);
        let (many, around) = (Many::new(patterns)?, Around::default());
        Ok(Self { patterns, many, reach, places, around, max: usize::MAX, threads: 1 })
    }

    /// Searches. `tell` gets the matches in the order of addresses, and how many bytes of data were
    /// searched since it was called last. Returns how many matches there were.
    pub(super) fn run<S: Source>(
        &self,
        source: &S,
        mut tell: impl FnMut(&[Match], u64) -> Result<()>,
    ) -> Result<usize> {
        let mut count = 0;
        let share = total(self.places.data) / (self.threads as u64 * BATCHES);
        let batch = share.clamp(*BATCH.start(), *BATCH.end());
        let batches = self.places.batches(self.reach, S::PIECE, batch);
        let work = |pieces: Vec<Piece>, sink: &Sink<PieceMatches>| self.work(&pieces, source, sink);
        in_order(self.threads, batches, work, |PieceMatches { matches, bytes }| {
            let matches = matches.get(..self.max - count).unwrap_or(&matches);
            count += matches.len();
            tell(matches, bytes)?;
            Ok(if count == self.max { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        Ok(count)
    }

    fn work(
        &self,
        pieces: &[Piece],
        source: &impl Source,
        sink: &Sink<PieceMatches>,
    ) -> Result<()> {
        let mut copy = Copy::default();
        let mut quiet = 0;
        for piece in pieces {
            let matches = self.search(piece, source, &mut copy)?;
            quiet += piece.len();
            // Few at a time: many items' results wait for their turn.
            for matches in matches.chunks(TOGETHER) {
                sink.send(PieceMatches {
                    matches: matches.to_vec(),
                    bytes: std::mem::take(&mut quiet),
                })?;
            }
        }
        sink.send(PieceMatches { matches: Vec::new(), bytes: quiet })
    }

    fn search(&self, piece: &Piece, source: &impl Source, copy: &mut Copy) -> Result<Vec<Match>> {
        let mut matches = Vec::new();
        // What was copied for another piece is old.
        copy.bytes.clear();
        let data = piece.data_of_starts();
        source.begin(&data);
        let mut search_for = |number: usize, matches: &mut Vec<Match>| {
            let from = matches.len();
            self.search_for(number, piece, source, copy, matches)?;
            matches.truncate(from.saturating_add(self.max));
            Ok::<_, anyhow::Error>(())
        };
        match &self.many {
            Some(many) => {
                many.others().iter().try_for_each(|number| search_for(*number, &mut matches))?;
                let places = self.copy(&piece.starts, 0, piece, source, copy)?;
                let found = many.find(self.patterns, &copy.bytes, places);
                self.keep(found, usize::MAX, piece, source, copy, &mut matches);
            }
            None => {
                (0..self.patterns.len()).try_for_each(|number| search_for(number, &mut matches))?;
            }
        }
        source.end(&data);
        matches.sort_unstable_by(Match::order);
        matches.truncate(self.max);
        Ok(matches)
    }

    /// Looks for one of the patterns.
    fn search_for(
        &self,
        number: usize,
        piece: &Piece,
        source: &impl Source,
        copy: &mut Copy,
        matches: &mut Vec<Match>,
    ) -> Result<()> {
        let Piece { starts, data, .. } = piece;
        let Some(pattern) = self.patterns.get(number) else { return Ok(()) };
        // Where the pattern lies in data as a whole.
        let inner = starts.start.max(data.start)
            ..starts.end.min((data.end + 1).saturating_sub(pattern.len() as u64));
        let mut at = starts.start;
        if let Some((probe, anchor)) = pattern.probe().filter(|_| !inner.is_empty()) {
            let anchor = anchor as u64;
            let many = (inner.end - inner.start) / DENSE + 16;
            let mut copied = 0;
            // As long as there are few candidates; what is left is copied.
            while copied < many && at < inner.end {
                let from = at.max(inner.start);
                let Some(found) = source.find(probe, from + anchor, inner.end - from) else {
                    break;
                };
                if from > at {
                    self.copied(number, at..from, piece, source, copy, matches)?;
                }
                at = found.map_or(inner.end, |found| found.at - anchor);
                if found.is_some() {
                    let block = at..inner.end.min(at + PLACES as u64);
                    at = block.end;
                    self.copied(number, block, piece, source, copy, matches)?;
                    copied += 1;
                }
            }
        }
        self.copied(number, at..starts.end, piece, source, copy, matches)
    }

    /// Looks for a pattern at `starts` in a copy.
    fn copied(
        &self,
        number: usize,
        starts: GpaRange,
        piece: &Piece,
        source: &impl Source,
        copy: &mut Copy,
        matches: &mut Vec<Match>,
    ) -> Result<()> {
        let Some(pattern) = self.patterns.get(number).filter(|_| !starts.is_empty()) else {
            return Ok(());
        };
        let places = self.copy(&starts, pattern.lookback(), piece, source, copy)?;
        let found = pattern.find(&copy.bytes, places).map(|found| (number, found));
        self.keep(found, self.max, piece, source, copy, matches);
        Ok(())
    }

    /// Sees to it that `copy` has what a search for beginnings at `starts` needs, `lookback` bytes
    /// before them among it. Returns where they are in the copy.
    fn copy(
        &self,
        starts: &GpaRange,
        lookback: usize,
        piece: &Piece,
        source: &impl Source,
        copy: &mut Copy,
    ) -> Result<Range<usize>> {
        let Around { before, after } = self.around;
        let back = before.max(lookback as u64);
        let ahead = (self.reach + 1 + after).max(SHOWN);
        let wanted = starts.start.saturating_sub(back).max(piece.run.start)
            ..piece.run.end.min(starts.end.saturating_add(ahead));
        let end = copy.start + copy.bytes.len() as u64;
        if copy.bytes.is_empty() || wanted.start < copy.start || wanted.end > end {
            copy.start = wanted.start;
            copy.bytes.resize(usize::try_from(wanted.end - wanted.start)?, 0);
            self.places
                .fill(wanted.start, &mut copy.bytes, |gpa, buffer| source.read(gpa, buffer))?;
        }
        Ok(usize::try_from(starts.start - copy.start)?..usize::try_from(starts.end - copy.start)?)
    }

    /// Adds matches in a copy, each with the number of its pattern, at most `max`.
    fn keep(
        &self,
        found: impl Iterator<Item = (usize, Range<usize>)>,
        max: usize,
        piece: &Piece,
        source: &impl Source,
        copy: &Copy,
        matches: &mut Vec<Match>,
    ) {
        let Around { before, after } = self.around;
        // It must touch data that can be read.
        let counts = |(_, found): &(usize, Range<usize>)| {
            let found = copy.start + found.start as u64..copy.start + found.end as u64;
            found.end > piece.data.start && !source.is_unreadable(&found)
        };
        let found: Vec<(usize, Range<usize>)> = found.filter(counts).take(max).collect();
        let shown = |found: &Range<usize>| {
            let end = if before == 0 && after == 0 {
                found.start + usize::try_from(SHOWN).unwrap_or(0)
            } else {
                found.end.saturating_add(usize::try_from(after).unwrap_or(usize::MAX))
            };
            found.start.saturating_sub(usize::try_from(before).unwrap_or(usize::MAX))
                ..end.min(copy.bytes.len())
        };
        let shown_parts = || found.iter().map(|(_, found)| shown(found));
        let (Some(first), Some(last)) =
            (shown_parts().map(|part| part.start).min(), shown_parts().map(|part| part.end).max())
        else {
            return;
        };
        // All of them share one copy.
        let kept: Arc<[u8]> = copy.bytes.get(first..last).unwrap_or_default().into();
        matches.extend(found.into_iter().map(|(pattern, found)| {
            let Range { start, end } = shown(&found);
            Match {
                gpa: copy.start + found.start as u64,
                len: found.len(),
                pattern,
                copy: Arc::clone(&kept),
                at: found.start - first,
                shown: start - first..end - first,
            }
        }));
    }
}

#[cfg(test)]
mod tests;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where matches may lie: data, and the memory around it that reads as zeros.

use std::ops::Range;

use anyhow::Result;

use crate::range::GpaRange;

/// Memory that is searched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places<'a> {
    /// Memory in which a match may lie: ascending, each apart from the next.
    pub(crate) runs: &'a [GpaRange],
    /// The parts of it that hold data, ascending. The rest reads as zeros; a match must touch
    /// data.
    pub(crate) data: &'a [GpaRange],
}

/// Memory in which beginnings of matches are looked for at a time.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) starts: GpaRange,
    /// The part of the data for which it is: it begins not before the first start.
    pub(crate) data: GpaRange,
    /// The memory around it.
    pub(crate) run: GpaRange,
}

impl Piece {
    /// The data that it stands for.
    pub(crate) fn data_of_starts(&self) -> GpaRange {
        self.starts.start.max(self.data.start)..self.starts.end
    }

    /// Bytes of data that it stands for.
    pub(crate) fn len(&self) -> u64 {
        let Range { start, end } = self.data_of_starts();
        end - start
    }
}

impl<'a> Places<'a> {
    /// The places where matches may begin, at most `size` bytes at a time: those in data, and
    /// `reach` bytes before it, as many as a match may take in.
    pub(crate) fn pieces(self, reach: u64, size: u64) -> impl Iterator<Item = Piece> + 'a {
        let mut before = 0;
        self.data.iter().flat_map(move |part| {
            let run = self.runs.partition_point(|run| run.end <= part.start);
            let run = self.runs.get(run).unwrap_or(part);
            let mut start = part.start.saturating_sub(reach).max(run.start).max(before);
            before = part.end;
            std::iter::from_fn(move || {
                let starts = start..part.end.min(start.saturating_add(size));
                start = starts.end;
                (!starts.is_empty()).then(|| Piece { starts, data: part.clone(), run: run.clone() })
            })
        })
    }

    /// The same pieces, as many together as it takes for `batch` bytes.
    pub(crate) fn batches(
        self,
        reach: u64,
        size: u64,
        batch: u64,
    ) -> impl Iterator<Item = Vec<Piece>> + 'a {
        let mut pieces = self.pieces(reach, size);
        std::iter::from_fn(move || {
            let mut together = Vec::new();
            let mut bytes = 0;
            while bytes < batch {
                let Some(piece) = pieces.next() else { break };
                bytes += piece.starts.end - piece.starts.start;
                together.push(piece);
            }
            (!together.is_empty()).then_some(together)
        })
    }

    /// Fills `buffer` from `gpa` on, with zeros where there is no data.
    pub(crate) fn fill(
        self,
        gpa: u64,
        buffer: &mut [u8],
        read: impl Fn(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let end = gpa + buffer.len() as u64;
        let first = self.data.partition_point(|part| part.end <= gpa);
        let (mut at, mut rest) = (gpa, buffer);
        for part in self.data.iter().skip(first).take_while(|part| part.start < end) {
            let (start, end) = (part.start.max(at), part.end.min(end));
            let (hole, data) = rest.split_at_mut(usize::try_from(start - at)?);
            let (data, more) = data.split_at_mut(usize::try_from(end - start)?);
            hole.fill(0);
            read(start, data)?;
            (at, rest) = (end, more);
        }
        rest.fill(0);
        Ok(())
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The way from the view to the file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, ensure};
use indicatif::ProgressBar;
use kvmmem::PAGE_SIZE;
use kvmmem::view::{State, View};

use super::REMEDY;
use super::checkpoint::Checkpoint;
use super::layout::Layout;
use crate::interrupt::Interrupt;
use crate::range::{GpaRange, total};
use crate::source::data_within;

/// Bytes that are read at a time.
const CHUNK: u64 = 1 << 20;

/// How often it is written down how far the dump is.
const SAVE_INTERVAL: Duration = Duration::from_secs(2);

/// A dump under way.
pub(super) struct Transfer<'a> {
    pub(super) view: &'a View,
    pub(super) path: &'a Path,
    pub(super) file: &'a File,
    pub(super) layout: &'a Layout,
    pub(super) checkpoint: &'a mut Checkpoint,
    /// The view's, when the dump began.
    pub(super) generation: u64,
    pub(super) interrupt: &'a Interrupt,
    pub(super) bar: &'a ProgressBar,
}

impl Transfer<'_> {
    /// Dumps to the end; where that fails, says how to go on.
    pub(super) fn run(mut self) -> Result<()> {
        let result = self.copy().and_then(|()| self.finish());
        self.bar.finish_and_clear();
        result.map_err(|error| self.explain(error))
    }

    fn explain(&mut self, error: Error) -> Error {
        // Where asking fails, the view has ended, and the error says why.
        let is_stale = self.is_stale().unwrap_or(false);
        // If this fails as well, an older checkpoint is there.
        if let Err(error) = self.save() {
            tracing::warn!("{error:#}");
        }
        let file = self.path.display();
        error.context(if is_stale {
            format!("the target's memory was reset or resized in the middle of the dump; {file}: {REMEDY}")
        } else {
            format!(
                "the dump stopped at gpa {:#x}; {file} holds what lies below: go on with --resume, by a new token",
                self.checkpoint.next
            )
        })
    }

    fn copy(&mut self) -> Result<()> {
        let left = self.checkpoint.left();
        let data: Vec<GpaRange> =
            left.iter().flat_map(|range| data_within(self.view, range)).collect::<Result<_>>()?;
        self.bar.set_length(total(&data) + self.checkpoint.data_bytes);
        let mut buffer = vec![0; usize::try_from(CHUNK)?];
        let mut saved = Instant::now();
        for range in left {
            for data in data_within(self.view, &range) {
                let data = data?;
                let mut at = data.start;
                while at < data.end {
                    let end = data.end.min(at.saturating_add(CHUNK));
                    self.copy_chunk(at..end, &mut buffer)?;
                    at = end;
                    if saved.elapsed() >= SAVE_INTERVAL {
                        ensure!(!self.is_stale()?, "the target's generation has changed");
                        self.save()?;
                        saved = Instant::now();
                    }
                }
            }
            self.checkpoint.next = range.end;
        }
        Ok(())
    }

    fn copy_chunk(&mut self, chunk: GpaRange, buffer: &mut [u8]) -> Result<()> {
        ensure!(!self.interrupt.has_come(), "interrupted");
        let len = chunk.end - chunk.start;
        let buffer = buffer.get_mut(..usize::try_from(len)?).context("the buffer is too small")?;
        self.view.read_at(chunk.start, buffer)?;
        let mut offset = self.layout.offset(chunk.start);
        for (is_zero, bytes) in runs(buffer) {
            // Where pages are zero the file keeps its hole.
            if !is_zero {
                self.file.write_all_at(bytes, offset).context("cannot write the dump")?;
            }
            offset += bytes.len() as u64;
        }
        self.checkpoint.next = chunk.end;
        self.checkpoint.data_bytes += len;
        self.bar.set_position(self.checkpoint.data_bytes);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        ensure!(!self.is_stale()?, "the target's generation has changed");
        self.file
            .set_len(self.layout.len)
            .and_then(|()| self.file.sync_all())
            .context("cannot write the dump")?;
        Checkpoint::remove(self.path)
    }

    /// Whether the target is not the one any more with which the dump began. The end of the view is another matter.
    fn is_stale(&mut self) -> Result<bool> {
        let now = self.view.status()?;
        self.checkpoint.is_stale |= now.state == State::Open && now.generation != self.generation;
        Ok(self.checkpoint.is_stale)
    }

    /// Writes down how far the dump is, once that is on disk.
    fn save(&self) -> Result<()> {
        self.file.sync_data().context("cannot write the dump")?;
        self.checkpoint.save(self.path)
    }
}

/// The bytes in parts of whole pages, as long as can be, that are all zero or have no page that is.
fn runs(mut bytes: &[u8]) -> impl Iterator<Item = (bool, &[u8])> {
    const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    let is_zero = |page: &[u8]| ZEROS.starts_with(page);
    std::iter::from_fn(move || {
        let mut pages = bytes.chunks(PAGE_SIZE);
        let first = is_zero(pages.next()?);
        let more: usize = pages.take_while(|page| is_zero(page) == first).map(<[u8]>::len).sum();
        let (run, rest) = bytes.split_at(bytes.len().min(PAGE_SIZE) + more);
        bytes = rest;
        Some((first, run))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_whole_pages_of_one_kind() {
        let mut bytes = vec![0; 5 * PAGE_SIZE + 7];
        bytes[PAGE_SIZE] = 1;
        bytes[3 * PAGE_SIZE - 1] = 1;
        let lengths: Vec<(bool, usize)> = runs(&bytes).map(|(is_zero, run)| (is_zero, run.len())).collect();
        assert_eq!(lengths, [(true, PAGE_SIZE), (false, 2 * PAGE_SIZE), (true, 2 * PAGE_SIZE + 7)]);
        assert_eq!(runs(&bytes).flat_map(|(_, run)| run).copied().collect::<Vec<u8>>(), bytes);
        assert_eq!(runs(&[]).count(), 0);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The way from the view to the file.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, ensure};
use indicatif::ProgressBar;
use kvmmem::view::{View, ViewError};

use super::checkpoint::{Checkpoint, REMEDY};
use super::digest::Digest;
use super::layout::Layout;
use super::pause::{Pause, PauseReport};
use super::sink::Sink;
use crate::interrupt::Interrupt;
use crate::range::{GpaRange, total};
use crate::source::data_within;
use crate::target_run::TargetRun;
use crate::unreadable::{add, read};

/// Bytes that are read at a time.
const CHUNK: u64 = 1 << 20;

/// How often it is written down how far the dump is.
const SAVE_INTERVAL: Duration = Duration::from_secs(2);

/// A dump under way.
pub(super) struct Transfer<'a> {
    pub(super) view: &'a View,
    pub(super) path: &'a Path,
    pub(super) sink: &'a mut Sink,
    pub(super) digest: Option<Digest>,
    pub(super) layout: &'a Layout,
    pub(super) checkpoint: &'a mut Checkpoint,
    /// The target's, when the dump began.
    pub(super) run: TargetRun,
    pub(super) interrupt: &'a Interrupt,
    pub(super) bar: &'a ProgressBar,
    /// Ended as soon as all memory is read.
    pub(super) pause: Option<Pause>,
}

/// What came of it.
pub(super) struct TransferResult {
    pub(super) sha256: Option<String>,
    pub(super) compressed_bytes: Option<u64>,
    pub(super) pause: Option<PauseReport>,
}

impl Transfer<'_> {
    /// Dumps to the end. The error of a dump that fails has the way to continue.
    pub(super) fn run(mut self) -> Result<TransferResult> {
        let result = self.copy().and_then(|()| self.finish());
        self.bar.finish_and_clear();
        // The target must run before anything is printed.
        drop(self.pause.take());
        result.map_err(|error| self.explain(error))
    }

    fn explain(&mut self, error: Error) -> Error {
        // If this fails the view has ended, and the error has the reason.
        let is_stale = self.is_stale().unwrap_or(false);
        // If this fails as well, an older checkpoint is there.
        if let Err(error) = self.save() {
            tracing::warn!("{error:#}");
        }
        let (file, next) = (self.path.display(), self.checkpoint.next);
        error.context(match (&*self.sink, is_stale) {
            (Sink::Stream { .. }, true) => {
                "the target's memory was reset or resized in the middle of the dump: begin again".to_owned()
            }
            (Sink::Stream { .. }, false) => format!("the dump stopped at gpa {next:#x}: begin again"),
            (Sink::File(_), true) => format!(
                "the target's memory was reset or resized in the middle of the dump; {file}: {REMEDY}"
            ),
            (Sink::File(_), false) => format!(
                "the dump stopped at gpa {next:#x}; {file} holds what lies below: go on with --resume, by a new token"
            ),
        })
    }

    fn copy(&mut self) -> Result<()> {
        let left = self.checkpoint.left();
        if !self.bar.is_hidden() {
            let data = left.iter().flat_map(|range| data_within(self.view, range));
            self.bar.set_length(total(&data.collect::<Result<Vec<GpaRange>>>()?));
            self.bar.reset_elapsed();
        }
        let mut buffer = Vec::new();
        let mut saved = Instant::now();
        for range in left {
            if let Some((offset, header)) = self.layout.header(range.start) {
                self.put(offset, header)?;
            }
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

    fn copy_chunk(&mut self, chunk: GpaRange, buffer: &mut Vec<u8>) -> Result<()> {
        ensure!(!self.interrupt.has_come(), "interrupted");
        if let Some(pause) = &self.pause {
            pause.check().context("the target runs again before its memory is dumped")?;
        }
        let len = chunk.end - chunk.start;
        buffer.resize(usize::try_from(len)?, 0);
        let copy = |gpa: u64, buffer: &mut [u8]| self.view.read_at(gpa, buffer);
        let (unreadable, _) = read(chunk.start, buffer, copy, ViewError::is_unreadable)?;
        // Memory that has moved cannot be read where it was, but that is another matter.
        ensure!(unreadable.is_empty() || !self.is_stale()?, "the target's generation has changed");
        let offset = self.layout.offset(chunk.start);
        self.sink.put(offset, buffer)?;
        if let Some(digest) = &mut self.digest {
            digest.put_buffer(offset, buffer)?;
        }
        self.checkpoint.next = chunk.end;
        self.checkpoint.data_bytes += len - total(&unreadable);
        for range in unreadable {
            add(&mut self.checkpoint.unreadable, range);
        }
        self.bar.inc(len);
        Ok(())
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.sink.put(offset, bytes)?;
        self.digest.as_mut().map_or(Ok(()), |digest| digest.put(offset, bytes))
    }

    fn finish(&mut self) -> Result<TransferResult> {
        ensure!(!self.is_stale()?, "the target's generation has changed");
        let pause = self.pause.take().map(Pause::end).transpose()?;
        let compressed_bytes = self.sink.finish(self.layout.len)?;
        let sha256 = self.digest.take().map(|digest| digest.finish(self.layout.len)).transpose()?;
        Ok(TransferResult { sha256, compressed_bytes, pause })
    }

    /// Whether the target is not the one any more with which the dump began. The end of the view
    /// alone does not change it.
    fn is_stale(&mut self) -> Result<bool> {
        self.checkpoint.is_stale |= self.run.has_ended(self.view)?;
        Ok(self.checkpoint.is_stale)
    }

    /// Writes down how far the dump is, once that is on disk.
    fn save(&self) -> Result<()> {
        let Sink::File(file) = &*self.sink else { return Ok(()) };
        file.sync_data().context("cannot write the dump")?;
        self.checkpoint.save(self.path)
    }
}

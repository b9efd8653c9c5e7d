// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem dump`: a target's memory as a file.

mod checkpoint;
mod layout;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use indicatif::ProgressBar;
use kvmmem::PAGE_SIZE;
use kvmmem::view::{Access, State, Status, View};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use uuid::Uuid;

use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::progress;
use crate::range::{GpaRange, in_order, parse_range, select, total};
use crate::source::{Source, data_within, ranges};
use checkpoint::Checkpoint;
use layout::{Format, Layout};

/// Bytes that are read at a time.
const CHUNK: u64 = 1 << 20;

/// How often it is written down how far the dump is.
const SAVE_INTERVAL: Duration = Duration::from_secs(2);

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// The file to write; only its owner may read it
    file: PathBuf,
    /// The kind of file
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// Dump only these guest-physical addresses, for example 1M..2M; END is behind the range; may be given again
    #[arg(long = "range", value_name = "START..END", value_parser = parse_range)]
    ranges: Vec<GpaRange>,
    /// Go on with a dump that was not finished; the same target's, by a new token
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    source: Source,
}

const AFTER_HELP: &str = "\
The file is sparse: what the target never used takes no space, here or there. The target runs on meanwhile; pause it
for a picture of one moment. Until the dump is complete, FILE.part tells how far it is.

Exit codes:
  0  the file is complete
  1  failed, or interrupted; where standard error says so, --resume goes on
  2  the command line is wrong";

/// What to do where a dump cannot be resumed.
const REMEDY: &str = "remove it and its .part, and begin again";

/// A complete dump, as JSON.
#[derive(Serialize)]
struct Summary<'a> {
    file: &'a str,
    format: Format,
    target: Uuid,
    /// Length of the file.
    bytes: u64,
    /// How many of these were read from the target.
    data_bytes: u64,
    resumed: bool,
}

/// A dump under way.
struct Dump<'a> {
    arguments: &'a Arguments,
    view: &'a View,
    file: &'a File,
    layout: Layout,
    checkpoint: Checkpoint,
    /// The view's, when the dump began.
    generation: u64,
    saved: Instant,
    buffer: Vec<u8>,
    bar: ProgressBar,
    interrupt: Interrupt,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let wanted = in_order(&self.ranges)?;
        // Whatever is wrong with the files is told before a token is used.
        let earlier = Checkpoint::load(&self.file)?;
        let file = self.file.display();
        match (&earlier, self.resume, self.file.try_exists()?) {
            (Some(_), false, _) => {
                bail!("{file} is an unfinished dump: go on with --resume, or remove it and {file}.part")
            }
            (None, false, true) => bail!("{file} exists: remove it, or choose another name"),
            (None, true, true) => {
                bail!("{file} cannot be resumed: there is no {file}.part, so it is complete or no dump")
            }
            (Some(_), true, false) => {
                bail!("{file} is gone, only {file}.part is left: remove that, and begin again")
            }
            (Some(_), true, true) | (None, _, false) => {}
        }
        let interrupt = Interrupt::catch()?;
        let view = self.source.attach(Access::ReadOnly)?;
        let status = view.status()?;
        let reached = select(&wanted, &ranges(&view)?)?;
        ensure!(reached.len() < usize::from(u16::MAX), "too many ranges: {}", reached.len());

        let resumed = earlier.is_some();
        let checkpoint = match earlier {
            Some(earlier) => self.check(earlier, &status, &reached)?,
            None => Checkpoint::new(Uuid::from_bytes(status.uuid), status.generation, self.format, reached),
        };
        let layout = Layout::new(self.format, &checkpoint.ranges);
        let open = || {
            let file = OpenOptions::new().write(true).create_new(!resumed).mode(0o600).open(&self.file)?;
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            // Of what was written after the checkpoint, parts may be older than others.
            let keep = if resumed { layout.offset(checkpoint.next) } else { 0 };
            file.set_len(keep.max(layout.head.len() as u64))?;
            file.write_all_at(&layout.head, 0)?;
            Ok::<_, io::Error>(file)
        };
        let file = open().with_context(|| format!("cannot write {file}"))?;
        checkpoint.save(&self.file)?;

        let left = unread(&checkpoint);
        let data: Vec<GpaRange> =
            left.iter().flat_map(|range| data_within(&view, range)).collect::<Result<_>>()?;
        let bar = progress::bytes(total(&data) + checkpoint.data_bytes, output);
        bar.set_position(checkpoint.data_bytes);
        let mut dump = Dump {
            arguments: self,
            view: &view,
            file: &file,
            layout,
            checkpoint,
            generation: status.generation,
            saved: Instant::now(),
            buffer: vec![0; usize::try_from(CHUNK)?],
            bar,
            interrupt,
        };
        dump.run()?;
        let Dump { checkpoint, layout, bar, .. } = dump;
        bar.finish_and_clear();
        let Checkpoint { uuid, data_bytes, .. } = checkpoint;
        if output.is_json() {
            let file = &self.file.to_string_lossy();
            let bytes = layout.len;
            output.object(&Summary {
                file,
                format: self.format,
                target: uuid,
                bytes,
                data_bytes,
                resumed,
            })?;
        } else {
            output.line(format!(
                "{}: {} bytes, of which the target had used {data_bytes}",
                crate::failure::escape(&self.file.to_string_lossy()),
                layout.len
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// The earlier dump's checkpoint, if this one can go on there.
    fn check(&self, earlier: Checkpoint, status: &Status, reached: &[GpaRange]) -> Result<Checkpoint> {
        let file = self.file.display();
        let uuid = Uuid::from_bytes(status.uuid);
        ensure!(
            earlier.uuid == uuid,
            "{file} is a dump of another target, {}, and the token is for {uuid}: get a token for that one",
            earlier.uuid
        );
        ensure!(
            !earlier.is_stale && earlier.generation == status.generation,
            "the target's memory was reset or resized since {file} was begun (generation {:#x}, now {:#x}): {REMEDY}",
            earlier.generation,
            status.generation
        );
        ensure!(
            earlier.format == self.format,
            "{file} was begun in another format: give the same --format, or {REMEDY}"
        );
        ensure!(
            earlier.ranges == reached,
            "{file} was begun with other ranges, {}: give the same ones by a token that reaches them, or {REMEDY}",
            earlier.ranges.iter().map(|range| format!("{range:#x?}")).collect::<Vec<_>>().join(", ")
        );
        Ok(earlier)
    }
}

/// What of the ranges is not in the file yet.
fn unread(checkpoint: &Checkpoint) -> Vec<GpaRange> {
    let next = checkpoint.next;
    let left = checkpoint.ranges.iter().map(|range| range.start.max(next)..range.end);
    left.filter(|range| !range.is_empty()).collect()
}

impl Dump<'_> {
    /// Dumps to the end; where that fails, says how to go on.
    fn run(&mut self) -> Result<()> {
        let result = self.copy().and_then(|()| self.finish());
        result.map_err(|error| {
            self.bar.abandon();
            let file = self.arguments.file.display();
            // If this fails as well, an older checkpoint is there.
            if let Err(error) = self.save() {
                tracing::warn!("{error:#}");
            }
            if self.checkpoint.is_stale {
                return error;
            }
            error.context(format!(
                "the dump stopped at gpa {:#x}; {file} holds what lies below: go on with --resume, by a new token",
                self.checkpoint.next
            ))
        })
    }

    fn copy(&mut self) -> Result<()> {
        for range in unread(&self.checkpoint) {
            for data in data_within(self.view, &range) {
                let data = data?;
                let mut at = data.start;
                while at < data.end {
                    let end = data.end.min(at + CHUNK);
                    self.copy_chunk(at..end)?;
                    at = end;
                }
            }
            self.checkpoint.next = range.end;
        }
        Ok(())
    }

    fn copy_chunk(&mut self, chunk: GpaRange) -> Result<()> {
        ensure!(!self.interrupt.has_come(), "interrupted");
        let len = usize::try_from(chunk.end - chunk.start)?;
        let buffer = self.buffer.get_mut(..len).context("the buffer is too small")?;
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
        self.checkpoint.data_bytes += len as u64;
        self.bar.set_position(self.checkpoint.data_bytes);
        if self.saved.elapsed() >= SAVE_INTERVAL {
            self.check_generation()?;
            self.save()?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.check_generation()?;
        self.file
            .set_len(self.layout.len)
            .and_then(|()| self.file.sync_all())
            .context("cannot write the dump")?;
        Checkpoint::remove(&self.arguments.file)
    }

    /// An error if the target is not the one any more with which the dump began.
    fn check_generation(&mut self) -> Result<()> {
        let now = self.view.status()?;
        // The end of a view is another matter: reading tells of it.
        self.checkpoint.is_stale |= now.state == State::Open && now.generation != self.generation;
        ensure!(
            !self.checkpoint.is_stale,
            "the target's memory was reset or resized in the middle of the dump: {REMEDY}"
        );
        Ok(())
    }

    /// Writes down how far the dump is, once that is on disk.
    fn save(&mut self) -> Result<()> {
        self.file.sync_data().context("cannot write the dump")?;
        self.checkpoint.save(&self.arguments.file)?;
        self.saved = Instant::now();
        Ok(())
    }
}

/// The bytes in parts of whole pages, as long as can be, that are all zero or have no page that is.
fn runs(mut bytes: &[u8]) -> impl Iterator<Item = (bool, &[u8])> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
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

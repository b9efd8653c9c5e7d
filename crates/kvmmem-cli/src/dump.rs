// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem dump`: a target's memory as a file.

mod checkpoint;
mod layout;
mod transfer;

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use kvmmem::view::{Access, Status};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use uuid::Uuid;

use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::progress;
use crate::range::{GpaRange, in_order, parse_range, select};
use crate::source::{Source, ranges};
use checkpoint::Checkpoint;
use layout::{Format, Layout};
use transfer::Transfer;

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
for a picture of one moment. Until the dump is complete, FILE.part tells how far it is. A target that was reset since
then is not resumed; in a guest this can be told only while the view is open.

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

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let wanted = in_order(&self.ranges)?;
        // Whatever is wrong with the files is told before a token is used.
        let earlier = Checkpoint::load(&self.file)?;
        let file = self.file.display();
        let exists = self.file.try_exists().with_context(|| format!("cannot look for {file}"))?;
        match (&earlier, self.resume, exists) {
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
        let view = self.source.attach(Access::ReadOnly, "dump")?;
        let interrupt = Interrupt::catch()?;
        let status = view.status()?;
        let reached = select(&wanted, &ranges(&view)?)?;
        ensure!(reached.len() < usize::from(u16::MAX), "too many ranges: {}", reached.len());

        let resumed = earlier.is_some();
        let mut checkpoint = match earlier {
            Some(earlier) => self.check(earlier, &status, &reached)?,
            None => {
                let (uuid, generation) = (Uuid::from_bytes(status.uuid), self.generation(&status));
                Checkpoint::new(uuid, generation, self.format, reached)
            }
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
        let opened = open().with_context(|| format!("cannot write {file}"))?;
        checkpoint.save(&self.file)?;

        let bar = progress::bytes(0, output);
        Transfer {
            view: &view,
            path: &self.file,
            file: &opened,
            layout: &layout,
            checkpoint: &mut checkpoint,
            generation: status.generation,
            interrupt: &interrupt,
            bar: &bar,
        }
        .run()?;
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

    /// The target's generation, where the view has it.
    fn generation(&self, status: &Status) -> Option<u64> {
        self.source.is_on_host().then_some(status.generation)
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
            !earlier.is_stale && earlier.generation == self.generation(status),
            "the target's memory was reset or resized since {file} was begun: {REMEDY}"
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

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem dump`: a target's memory as a file or a stream.
//!
//! Mistakes in the command line and the paths are found before the token is used. While a dump is
//! under way FILE.part has its progress ([`checkpoint`]); a record beside a complete one describes
//! it ([`record`]).

mod arguments;
mod checkpoint;
mod digest;
mod elf;
mod layout;
mod notes;
mod path;
mod pause;
mod pipe;
mod process;
mod process_core;
mod process_notes;
mod process_record;
mod process_writer;
mod record;
mod report;
mod sink;
mod start;
mod transfer;

use std::process::ExitCode;

use anyhow::{Context, Result};
use kvmmem::view::Access;
use uuid::Uuid;

use crate::failure::usage;
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::progress;
use crate::range::{gaps, in_order, left_out, select};
use crate::source::ranges;
use crate::target_run::TargetRun;
pub(crate) use arguments::Arguments;
use checkpoint::Checkpoint;
use digest::Digest;
use layout::{Format, Layout};
use path::{Kind, NewFile};
use record::{Outcome, Record};
use report::exit_code;
use sink::Sink;
use start::Start;
use transfer::{Transfer, TransferResult};

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        if self.pause && !self.source.is_by_name() {
            let words = "--pause needs --target, on the target's host: a token opens memory alone, in an introspector too";
            return Err(usage(words));
        }
        if let Some(pid) = self.pid {
            return self.run_process(pid, output);
        }
        if self.dump.is_some() {
            return Err(usage(
                "--file goes with --pid: of a dump file, one process can be written",
            ));
        }
        let wanted = in_order(&self.ranges)?;
        let (earlier, file, kind) = match Start::open(self)? {
            Start::New => (None, None, Kind::File),
            Start::Stream(file) => {
                output.use_stderr();
                (None, Some(file), Kind::Stream)
            }
            Start::Unfinished(checkpoint, file) => (Some(*checkpoint), Some(file), Kind::File),
            Start::Complete(record) => {
                Checkpoint::remove(&self.file)?;
                report::print(&self.file, &record.record, record.sizes(), output)?;
                return Ok(exit_code(record.sizes().2));
            }
        };
        let asks_vmm = self.pause || self.format == Format::Elf;
        let (view, operator) =
            self.source.attach_asking(Access::ReadOnly, "dump", &wanted, asks_vmm)?;
        let interrupt = Interrupt::catch()?;
        // First: a reset after this makes the dump stale.
        let run = TargetRun::of(&view)?;
        let (status, instance) = (view.status()?, run.instance());
        let all = ranges(&view)?;
        let reached = select(&wanted, &all)?;
        let left_out = if wanted.is_empty() { gaps(&all) } else { left_out(&wanted, &all) };

        let resumed = earlier.is_some();
        if resumed && self.source.has_no_broker() {
            tracing::warn!(
                "no broker has watched the target: whether it was reset since the dump was begun is not known"
            );
        }
        let mut checkpoint = match earlier {
            Some(earlier) => {
                earlier.check(&self.file, self.format, &status, instance, &reached)?;
                earlier
            }
            None => {
                let uuid = Uuid::from_bytes(status.uuid);
                Checkpoint::new(uuid, instance, self.format, reached)
            }
        };
        let pause = match resumed {
            true => None,
            false => {
                let (pause, vcpus) = self.hold(operator, self.format == Format::Elf)?;
                match vcpus {
                    Ok(vcpus) => checkpoint.vcpus = vcpus,
                    Err(reason) => checkpoint.no_vcpus = Some(reason),
                }
                if self.format == Format::Elf {
                    checkpoint.put_kernel(&view, pause.is_none())?;
                }
                pause
            }
        };
        let layout = Layout::new(self.format, &checkpoint.ranges, &checkpoint.notes());
        let mut new = NewFile::none();
        let file = file.map_or_else(|| new.create(&self.file), Ok)?;
        let mut sink = Sink::new((file, kind), self.compress, &interrupt, pause.is_some())?;
        let digest = self.begin(&mut sink, &layout, &checkpoint, resumed)?;
        if matches!(sink, Sink::File(_)) {
            // From now on it can be continued. A compressed one cannot, nor one without a
            // checkpoint.
            new.keep();
        }

        let bar = progress::bytes(0, output);
        let transferred = Transfer {
            view: &view,
            path: &self.file,
            sink: &mut sink,
            digest,
            layout: &layout,
            checkpoint: &mut checkpoint,
            run,
            interrupt: &interrupt,
            bar: &bar,
            pause,
        }
        .run()?;
        new.keep();
        let TransferResult { sha256, compressed_bytes, pause } = transferred;
        let file = self.file.to_string_lossy();
        let outcome = Outcome {
            bytes: layout.len,
            compression: self.compress,
            compressed_bytes,
            resumed,
            sha256,
            pause,
        };
        let record = Record::new(&file, view.name(), &checkpoint, &outcome, &left_out);
        if let Some(path) = self.record_path() {
            record.save(&path)?;
        }
        if matches!(sink, Sink::File(_)) {
            Checkpoint::remove(&self.file)?;
        }
        let sizes = (layout.len, checkpoint.data_bytes, &*checkpoint.unreadable);
        report::print(&self.file, &record, sizes, output)?;
        if !output.is_json() {
            report::print_vcpus(self.format, &checkpoint, pause, output)?;
        }
        Ok(exit_code(&checkpoint.unreadable))
    }

    /// Writes the head, unless it is there, takes what is there into the digest, and saves the
    /// first checkpoint.
    fn begin(
        &self,
        sink: &mut Sink,
        layout: &Layout,
        checkpoint: &Checkpoint,
        resumed: bool,
    ) -> Result<Option<Digest>> {
        let mut digest = if self.no_hash { None } else { Some(Digest::start()?) };
        // Of what was written after the checkpoint, parts may be older than others.
        let keep = if resumed { layout.len_below(checkpoint.next) } else { 0 };
        let keep = keep.max(layout.head.len() as u64);
        sink.set_len(keep).with_context(|| format!("cannot write {}", self.file.display()))?;
        sink.put(0, &layout.head)?;
        if let (Some(digest), Sink::File(file)) = (&mut digest, &*sink) {
            digest.put_file(file, keep)?;
        } else if let Some(digest) = &mut digest {
            digest.put(0, &layout.head)?;
        }
        if matches!(sink, Sink::File(_)) {
            checkpoint.save(&self.file)?;
        }
        Ok(digest)
    }
}

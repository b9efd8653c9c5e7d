// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem dump`: a target's memory as a file or a stream.
//!
//! Mistakes in the command line and the paths are found before the token is used. While a dump is
//! under way FILE.part has its progress ([`checkpoint`]); a record beside a complete one describes
//! it ([`record`]).

mod checkpoint;
mod digest;
mod elf;
mod layout;
mod pause;
mod pipe;
mod process;
mod process_core;
mod process_notes;
mod record;
mod sink;
mod transfer;

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use kvmmem::view::{Access, Status, View};
use kvmmem_client::admin::VcpuRegisters;
use kvmmem_linux::{Find, FindError, Kernel};
use serde::Serialize;
use uuid::Uuid;

use crate::failure::usage;
use crate::interrupt::Interrupt;
use crate::number::{count, integer, parse};
use crate::output::Output;
use crate::progress;
use crate::range::{GpaRange, gaps, in_order, left_out, parse_range, select, shown, total};
use crate::source::{Operator, Source, ranges};
use crate::unreadable::UNREADABLE;
use checkpoint::Checkpoint;
use digest::Digest;
use layout::{Format, Layout};
use pause::{Pause, Paused};
use record::{Outcome, Record, Saved};
use sink::{Compression, Kind, Sink};
use transfer::{Transfer, Transferred};

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// The file to write, which only its owner may read; a FIFO, or - for standard output
    file: PathBuf,
    /// The kind of file
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// Dump only these guest-physical addresses, for example 1M..2M; END is not part of it; may
    /// be given again
    #[arg(long = "range", value_name = "START..END", value_parser = parse_range)]
    ranges: Vec<GpaRange>,
    /// Go on with a dump that was not finished; the same target's, by a new token
    #[arg(long)]
    resume: bool,
    /// Where to write the record of the dump [default: FILE.json; none for standard output or a
    /// FIFO]
    #[arg(long, value_name = "PATH")]
    record: Option<PathBuf>,
    /// Leave the SHA-256 of the file out of the record: of a large target that uses little of its
    /// memory, it takes most of the time
    #[arg(long)]
    no_hash: bool,
    /// Pause the target while its memory is read, so that the dump shows one moment. It runs again
    /// right after, and also if this command is killed, stopped or hangs; one that is not
    /// running stays as it is. With --target, where the broker has a QMP connection to the
    /// target's QEMU, or where it is a VM of kvmmem vm
    #[arg(long, conflicts_with = "resume")]
    pause: bool,
    /// Compress the file or stream; a dump that was not finished cannot be resumed then
    #[arg(long, value_enum, value_name = "METHOD", conflicts_with = "resume")]
    compress: Option<Compression>,
    /// Of a Linux guest: dump this process alone, as an ELF core that gdb opens with the process's
    /// program. What is not in memory is not in it
    #[arg(long, value_name = "PID", conflicts_with_all = ["format", "ranges", "resume"], value_parser = integer(0..=u32::MAX))]
    pid: Option<u32>,
    /// With --pid: the process as it is in this dump file, instead of a target's
    #[arg(long = "file", value_name = "DUMP", requires = "pid", conflicts_with_all = ["pause", "target", "token", "token_file", "listen", "device", "broker"])]
    dump: Option<PathBuf>,
    /// Of several kernels, the one whose VMCOREINFO note is at this guest-physical address
    #[arg(long, value_name = "GPA", value_parser = parse, requires = "pid", conflicts_with = "kernel")]
    note: Option<u64>,
    /// Of several kernels, the one in the address space of this CR3, its own or that of one of its
    /// processes
    #[arg(long, value_name = "CR3", value_parser = parse, requires = "pid")]
    kernel: Option<u64>,
    #[command(flatten)]
    source: Source,
}

const AFTER_HELP: &str = "\
The file is sparse: what the target's host has not allocated takes no space, here or there. The target runs on meanwhile;
for a picture of one moment, --pause. Until the dump is complete, FILE.part tells how far it is. A dump of a target that
was reset, resized or started again since then is not resumed; without a broker, resets go unnoticed.

Beside the file, FILE.json says of which target it is, when it was made, what is in it, what could not be read or was left
out, and its SHA-256. On a pipe all holes are zeros, and what is said goes to standard error. With --compress, the SHA-256
and all sizes and offsets are those of what the file unpacks to.

--format elf has the VMCOREINFO note of a Linux target, so that crash, drgn and makedumpfile open the file as it is; and with
--target, where the broker has a QMP connection to its QEMU or it is a VM of kvmmem vm, the vCPUs' registers. Without --pause each vCPU's are of another
moment.

--pid writes a core as the kernel does (core(5)): threads, mappings, mapped files, auxiliary vector. The registers are those
with which a thread entered the kernel; those of a thread that runs are zeros, and are listed. Each thread's floating point
registers are left out.

Exit codes:
  0  the file is complete
  1  failed, or interrupted; where standard error says so, --resume goes on
  2  the command line is wrong
  3  the file is complete, but for memory that could not be read: zeros are in its place";

/// What to do where a dump cannot be resumed.
const REMEDY: &str = "remove it and its .part, and begin again";

/// What is there of a dump before its token is used.
enum Start {
    /// Nothing: the file is made once there is something to write.
    New,
    Stream(File),
    /// A dump to continue.
    Unfinished(Box<Checkpoint>, File),
    /// A dump that is complete, record and all; only its checkpoint is left to be removed.
    Complete(Saved),
}

/// The vCPUs' registers, or why they are not known.
type Vcpus = Result<Vec<VcpuRegisters>, String>;

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
        let (earlier, file, kind) = match self.open()? {
            Start::New => (None, None, Kind::File),
            Start::Stream(file) => {
                output.use_stderr();
                (None, Some(file), Kind::Stream)
            }
            Start::Unfinished(checkpoint, file) => (Some(*checkpoint), Some(file), Kind::File),
            Start::Complete(record) => {
                Checkpoint::remove(&self.file)?;
                self.tell(&record.record, record.sizes(), output)?;
                return Ok(exit_code(record.sizes().2));
            }
        };
        let asks_vmm = self.pause || self.format == Format::Elf;
        let (view, operator) =
            self.source.attach_asking(Access::ReadOnly, "dump", &wanted, asks_vmm)?;
        let interrupt = Interrupt::catch()?;
        // In this order: a reset in between makes the dump stale.
        let status = view.status()?;
        let instance = view.instance()?;
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
            Some(earlier) => self.check(earlier, &status, instance, &reached)?,
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
        let is_new = file.is_none();
        let file = file.map_or_else(|| sink::open_file(&self.file, false), Ok)?;
        let mut sink = Sink::new((file, kind), self.compress, &interrupt, pause.is_some())?;
        let begun = self.begin(&mut sink, &layout, &checkpoint, resumed);
        if is_new && begun.is_err() {
            // There is nothing in it to continue.
            let _ = std::fs::remove_file(&self.file);
        }
        let digest = begun?;

        let bar = progress::bytes(0, output);
        let transferred = Transfer {
            view: &view,
            path: &self.file,
            sink: &mut sink,
            digest,
            layout: &layout,
            checkpoint: &mut checkpoint,
            generation: status.generation,
            interrupt: &interrupt,
            bar: &bar,
            pause,
        }
        .run();
        if is_new && transferred.is_err() && matches!(sink, Sink::Stream { .. }) {
            // A compressed file cannot be continued.
            let _ = std::fs::remove_file(&self.file);
        }
        let Transferred { sha256, compressed_bytes, pause } = transferred?;
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
        self.tell(&record, (layout.len, checkpoint.data_bytes, &checkpoint.unreadable), output)?;
        if !output.is_json() {
            self.tell_vcpus(&checkpoint, pause, output)?;
        }
        Ok(exit_code(&checkpoint.unreadable))
    }

    /// Pauses the target where that is wanted, and asks for the vCPUs' registers. Returns a reason
    /// where they are not known.
    fn hold(
        &self,
        operator: Option<Operator>,
        wants_vcpus: bool,
    ) -> Result<(Option<Pause>, Vcpus)> {
        let Some(mut operator) = operator else {
            let reason = "a token opens memory alone: on the host, name the target (--target)";
            return Ok((None, Err(reason.into())));
        };
        let began = Instant::now();
        let target = operator.target.clone();
        let paused = match self.pause {
            true => match operator.admin.pause(&target) {
                Ok(was_running) => Some(was_running),
                Err(error) => {
                    return Err(operator.explain(error).context("cannot pause the target"));
                }
            },
            false => None,
        };
        let vcpus = match wants_vcpus {
            true => operator
                .admin
                .registers(&target)
                .map_err(|error| format!("{:#}", operator.explain(error))),
            false => Ok(Vec::new()),
        };
        let pause =
            paused.map(|was_running| Pause::keep(operator, was_running, began)).transpose()?;
        Ok((pause, vcpus))
    }

    /// Opens a stream or what is there of an earlier dump; checks that there can be a new file.
    fn open(&self) -> Result<Start> {
        let file = self.file.display();
        if sink::kind(&self.file)? == Kind::Stream {
            ensure!(!self.resume, "{file} is a stream: what it has got cannot be resumed");
            if let Some(record) = &self.record {
                sink::check_new(record)?;
            }
            return Ok(Start::Stream(sink::open_stream(&self.file)?));
        }
        let earlier = Checkpoint::load(&self.file)?;
        let exists = self.file.try_exists().with_context(|| format!("cannot look for {file}"))?;
        match (&earlier, self.resume, exists) {
            (Some(_), false, _) => {
                bail!(
                    "{file} is an unfinished dump: go on with --resume, or remove it and {file}.part"
                )
            }
            (None, false, true) => bail!("{file} exists: remove it, or choose another name"),
            (None, true, true) => {
                bail!(
                    "{file} cannot be resumed: there is no {file}.part, so it is complete or no dump"
                )
            }
            (Some(_), true, false) => {
                bail!("{file} is gone, only {file}.part is left: remove that, and begin again")
            }
            (Some(_), true, true) | (None, _, false) => {}
        }
        let record = self.record_path().unwrap_or_default();
        ensure!(record != self.file, "--record names the file of the dump itself");
        let Some(checkpoint) = earlier else {
            sink::check_new(&self.file)?;
            sink::check_new(&record)?;
            return Ok(Start::New);
        };
        let opened = sink::open_file(&self.file, true)?;
        let len = self.file.metadata().with_context(|| format!("cannot look at {file}"))?.len();
        if let Some(saved) = Saved::load(&record, &checkpoint, len) {
            return Ok(Start::Complete(saved));
        }
        sink::check_new(&record)?;
        Ok(Start::Unfinished(Box::new(checkpoint), opened))
    }

    /// Where the record goes.
    fn record_path(&self) -> Option<PathBuf> {
        let beside = || {
            let mut path = self.file.as_os_str().to_owned();
            path.push(".json");
            (sink::kind(&self.file).ok()? == Kind::File).then(|| path.into())
        };
        self.record.clone().or_else(beside)
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

    /// Prints what was dumped.
    fn tell(
        &self,
        record: &impl Serialize,
        (bytes, data_bytes, unreadable): (u64, u64, &[GpaRange]),
        output: &mut Output,
    ) -> Result<()> {
        let file = crate::failure::escape(&self.file.to_string_lossy());
        if output.is_json() {
            output.object(record)?;
        } else {
            output.line(format!(
                "{file}: {}, of which {data_bytes} were allocated in the target",
                count(bytes, "byte")
            ))?;
        }
        if !unreadable.is_empty() && !output.is_json() {
            output.line(format!(
                "{} of these could not be read and are zeros in the file: {}",
                count(total(unreadable), "byte"),
                shown(unreadable)
            ))?;
        }
        Ok(())
    }

    /// Prints which registers the dump has.
    fn tell_vcpus(
        &self,
        checkpoint: &Checkpoint,
        pause: Option<Paused>,
        output: &mut Output,
    ) -> Result<()> {
        if let Some(pause) = pause {
            output.line(pause.to_string())?;
        }
        if self.format == Format::Elf {
            output.line(match &checkpoint.no_vcpus {
                Some(reason) => {
                    format!("no registers are in it: {}", crate::failure::escape(reason))
                }
                None => {
                    format!("the registers of {} are in it", count(checkpoint.vcpus.len(), "vCPU"))
                }
            })?;
        }
        Ok(())
    }

    /// The earlier dump's checkpoint, if this dump can continue from it.
    fn check(
        &self,
        earlier: Checkpoint,
        status: &Status,
        instance: Option<u64>,
        reached: &[GpaRange],
    ) -> Result<Checkpoint> {
        let file = self.file.display();
        let uuid = Uuid::from_bytes(status.uuid);
        ensure!(
            earlier.uuid == uuid,
            "{file} is a dump of another target, {}, and the token is for {uuid}: get a token for that one",
            earlier.uuid
        );
        ensure!(
            earlier.instance.is_some() && instance.is_some(),
            "this machine's driver or its host is older than {file}.part and does not say whether the target was \
             started again since: {REMEDY}"
        );
        ensure!(
            !earlier.is_stale && earlier.instance == instance,
            "the target was reset, resized or started again since {file} was begun: {REMEDY}"
        );
        ensure!(
            earlier.format == self.format,
            "{file} was begun in another format: give the same --format, or {REMEDY}"
        );
        ensure!(
            earlier.ranges == reached,
            "{file} was begun with other ranges, {}: give the same ones by a token that reaches them, or {REMEDY}",
            shown(&earlier.ranges)
        );
        Ok(earlier)
    }
}

impl Checkpoint {
    /// Adds what is found of the kernel that runs in the target.
    fn put_kernel(&mut self, view: &View, is_live: bool) -> Result<()> {
        let cr3 = self.vcpus.first().map(|vcpu| vcpu.cr3);
        match Kernel::find(view, Find { is_live, cr3, ..Find::default() }) {
            Ok(kernel) => {
                let note = kernel.note();
                self.vmcoreinfo = note.gpa.map(|gpa| (gpa, note.text().to_owned()));
                self.direct_map = kernel.direct_map();
            }
            Err(FindError::Memory(error)) => return Err(error.into()),
            Err(FindError::NoKernel) => {}
            Err(error) => tracing::warn!("{error}; the file has no VMCOREINFO note"),
        }
        Ok(())
    }
}

/// What the command ends with, once the file is there.
fn exit_code(unreadable: &[GpaRange]) -> ExitCode {
    if unreadable.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(UNREADABLE) }
}

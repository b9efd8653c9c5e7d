// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem dump --pid`: one process of a Linux guest, of a target or in a dump file, as an ELF
//! core, as the kernel would write it (core(5)): gdb opens it with the process's program and
//! libraries.

use std::fs::File;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use kvmmem::view::{Access, View};
use kvmmem_linux::maps::Maps;
use kvmmem_linux::tasks::{Tasks, Which};
use kvmmem_linux::{Find, Kernel};
use kvmmem_memory::{DumpFile, PAGE_SIZE};

use super::arguments::Arguments;
use super::checkpoint::Checkpoint;
use super::digest::Digest;
use super::elf::{self, Load};
use super::path::{self, Kind, NewFile};
use super::pause::Pause;
use super::process::{self, Segment};
use super::process_notes::{Thread, notes};
use super::process_record::CoreRecord;
use super::process_writer::{WriteResult, Writer};
use super::sink::Sink;
use crate::input::InputMemory;
use crate::interrupt::Interrupt;
use crate::linux::{RestartCheck, collect, explain, no_process};
use crate::number::count;
use crate::output::Output;
use crate::process::mapped;
use crate::progress;
use crate::shell::quote;
use crate::unreadable::UNREADABLE;

/// What a core is written with.
struct Tools {
    /// An open stream; else a file is made once there is something to write.
    stream: Option<File>,
    kind: Kind,
    interrupt: Interrupt,
    pause: Option<Pause>,
}

/// A core that is complete.
struct Core {
    threads: Vec<Thread>,
    /// Threads of the guest that could not be read: some may be the process's.
    lost_threads: usize,
    loads: Vec<Load>,
    len: u64,
    is_torn: bool,
    is_damaged: bool,
    written: WriteResult,
}

impl Arguments {
    /// Writes the core of a process.
    pub(super) fn run_process(&self, pid: u32, output: &mut Output) -> Result<ExitCode> {
        let file = self.file.display();
        let kind = path::kind(&self.file)?;
        let stream = match kind {
            Kind::Stream => {
                output.use_stderr();
                Some(path::open_stream(&self.file)?)
            }
            Kind::File => {
                ensure!(
                    Checkpoint::load(&self.file)?.is_none(),
                    "{file} is an unfinished dump of a target: remove it and {file}.part, or choose another name"
                );
                path::check_new(&self.file)?;
                None
            }
        };
        let record_path = self.record_path();
        if let Some(path) = &record_path {
            ensure!(*path != self.file, "--record names the file of the dump itself");
            path::check_new(path)?;
        }
        let (guest, operator) = match &self.dump {
            Some(dump) => (InputMemory::File(DumpFile::open(dump)?), None),
            None => {
                let (view, operator) =
                    self.source.attach_asking(Access::ReadOnly, "dump", &[], self.pause)?;
                (InputMemory::View(view, self.source.name()), operator)
            }
        };
        let interrupt = Interrupt::catch()?;
        let (pause, _) = self.hold(operator, false)?;
        let is_live = guest.view().is_some() && pause.is_none();
        let find = Find {
            is_live,
            note: self.note,
            kernel: self.kernel,
            cr3: guest.cr3(),
            ..Find::default()
        };
        let restart = RestartCheck::begin(&guest)?;
        let kernel =
            Kernel::find(guest.memory(), find).map_err(|error| explain(error.into(), &guest))?;
        let tools = Tools { stream, kind, interrupt, pause };
        let core = self
            .write_core(&kernel, pid, tools, &|| restart.check(Some(&kernel)), output)
            .or_else(|error| restart.settle(Some(&kernel), Err(error)))?;
        let Core { threads, lost_threads, loads, len, is_torn, is_damaged, written } = core;
        let WriteResult { sha256, compressed_bytes, pause, unreadable } = written;
        let sum = |is_counted: fn(&Load) -> u64| loads.iter().map(is_counted).sum();
        let status = guest.view().map(View::status).transpose()?;
        let dump = self.dump.as_ref().map(|dump| dump.to_string_lossy());
        let record = CoreRecord {
            kvmmem: env!("CARGO_PKG_VERSION"),
            file: &self.file.to_string_lossy(),
            compression: self.compress,
            target: status.map(|status| uuid::Uuid::from_bytes(status.uuid)),
            name: guest.view().and_then(View::name),
            dump: dump.as_deref(),
            pid,
            comm: threads.first().map_or("", |(leader, _)| &leader.comm),
            bytes: len,
            compressed_bytes,
            mapped_bytes: sum(|load| load.len),
            memory_bytes: sum(|load| load.file_len),
            unreadable_bytes: unreadable,
            threads: threads.len(),
            lost_threads,
            without_registers: threads
                .iter()
                .filter_map(|(task, registers)| registers.is_none().then_some(task.tid))
                .collect(),
            torn: is_torn,
            damaged: is_damaged,
            sha256,
            pause,
        };
        if let Some(path) = record_path {
            record.save(&path)?;
        }
        record.print(output)?;
        let is_whole = unreadable == 0 && !is_damaged && lost_threads == 0;
        Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::from(UNREADABLE) })
    }

    /// Writes a process that is found in the guest. `check` fails where what was read does not
    /// belong together.
    fn write_core(
        &self,
        kernel: &Kernel<'_>,
        pid: u32,
        Tools { stream, kind, interrupt, pause }: Tools,
        check: &dyn Fn() -> Result<()>,
        output: &Output,
    ) -> Result<Core> {
        let (threads, lost_threads) = threads(kernel, pid)?;
        let (leader, _) = threads.first().with_context(|| {
            let arguments = match &self.dump {
                Some(dump) => format!(" --file {}", quote(dump)),
                None => self.source.arguments(),
            };
            no_process(kernel, pid, &arguments)
        })?;
        let space = kernel.space_of(leader)?;
        let map = Maps::new(kernel)?.of(leader)?;
        let has_damaged_thread = threads.iter().any(|(task, _)| task.is_damaged);
        if has_damaged_thread {
            tracing::warn!("of a thread of process {pid} its name, ids or state cannot be read");
        }
        if map.is_damaged() {
            tracing::warn!(
                "mappings of process {pid} cannot be read: the core lacks them, or their files' names"
            );
        }
        let auxv = kernel.auxiliary_vector(leader)?;
        let extents = mapped(&space)
            .with_context(|| format!("cannot tell what process {pid} has in memory"))?;
        let segments = process::segments(&map, &extents)?;
        let notes = notes(&threads, &auxv, &map);
        let (loads, len) = place(&segments, &notes);

        let mut new = NewFile::none();
        let opened = stream.map_or_else(|| new.create(&self.file), Ok)?;
        let mut sink = Sink::new((opened, kind), self.compress, &interrupt, pause.is_some())?;
        let digest = if self.no_hash { None } else { Some(Digest::start()?) };
        let writer =
            Writer { space: &space, sink: &mut sink, digest, interrupt: &interrupt, pause, check };
        let bar = progress::bytes(loads.iter().map(|load| load.file_len).sum(), output);
        let written = writer.write(&elf::head(&loads, &notes), &loads, len, |count| bar.inc(count));
        bar.finish_and_clear();
        let written = written.with_context(|| {
            format!("the core in {} is not complete: begin again", self.file.display())
        })?;
        new.keep();
        let (is_torn, is_damaged) = (map.is_torn, map.is_damaged() || has_damaged_thread);
        Ok(Core { threads, lost_threads, loads, len, is_torn, is_damaged, written })
    }
}

/// The threads of a process, its leader first, with their registers; and how many threads of the
/// guest cannot be read.
fn threads(kernel: &Kernel<'_>, pid: u32) -> Result<(Vec<Thread>, usize)> {
    let mut threads = Vec::new();
    let tasks = collect(|| Tasks::new(kernel, Which::Threads))?;
    if tasks.lost > 0 {
        tracing::warn!(
            "{} of the guest cannot be read: some of process {pid} may be missing",
            count(tasks.lost, "thread")
        );
    }
    for task in tasks.rows.into_iter().filter(|task| task.pid == pid) {
        ensure!(
            !task.is_kernel,
            "process {pid} is one of the kernel's own: it has no memory of its own"
        );
        let registers = kernel.user_registers(&task)?;
        threads.push((task, registers));
    }
    Ok((threads, tasks.lost))
}

/// The program headers of the segments, and the length of the file.
fn place(segments: &[Segment], notes: &[u8]) -> (Vec<Load>, u64) {
    let page = PAGE_SIZE as u64;
    let mut end = elf::head_len(segments.len(), notes).next_multiple_of(page);
    let mut loads = Vec::with_capacity(segments.len());
    for Segment { addresses, flags, is_present } in segments {
        let len = addresses.end - addresses.start;
        let file_len = if *is_present { len } else { 0 };
        loads.push(Load {
            flags: *flags,
            offset: end,
            file_len,
            virtual_address: addresses.start,
            physical_address: 0,
            len,
            align: page,
        });
        end += file_len;
    }
    (loads, end)
}

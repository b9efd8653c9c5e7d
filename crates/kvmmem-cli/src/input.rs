// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory that a verb reads: a target's, or that in a dump file.

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use kvmmem::view::{Access, Range, View};
use kvmmem_client::admin::VcpuRegisters;
use kvmmem_memory::paging::AddressSpace;
use kvmmem_memory::{DumpFile, Memory};

use crate::failure::usage;
use crate::memory;
use crate::parallel::{Sink, in_order};
use crate::range::GpaRange;
use crate::shell::quote;
use crate::source::{NO_TOKEN, Source};
use crate::target_name::TargetName;
use crate::vcpu;

#[derive(Args)]
pub(crate) struct Input {
    /// A dump file instead of a target: raw memory, with the record of kvmmem dump beside it if
    /// there is one, an ELF core or LiME
    #[arg(long, value_name = "DUMP", conflicts_with_all = ["target", "token", "token_file", "listen", "device", "broker"])]
    file: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
}

/// The registers of a target's vCPUs, or why they are not known.
pub(crate) type Registers = Result<Vec<VcpuRegisters>, String>;

/// Why MSR_LSTAR of a VM under QEMU is not known.
pub(crate) const NOT_SHOWN: &str =
    "QEMU's monitor does not show it, and other stock VMMs have none";

/// Memory that can be read.
pub(crate) enum InputMemory {
    /// That of a target, and how errors name it.
    View(View, String),
    File(DumpFile),
}

impl Input {
    /// A target of this host.
    pub(crate) fn of_target(target: TargetName) -> Self {
        Self { file: None, source: Source::of_target(target) }
    }

    /// Whether the memory is a target's, which may run.
    pub(crate) fn is_live(&self) -> bool {
        self.file.is_none()
    }

    /// The words that name the memory on the command line, with a space before them, for a shell;
    /// empty where a token or a connection does.
    pub(crate) fn arguments(&self) -> String {
        match &self.file {
            Some(path) => format!(" --file {}", quote(path)),
            None => self.source.arguments(),
        }
    }

    /// Opens the file, or attaches a view that reaches into each of `wanted`. `verb` is for the
    /// audit log.
    pub(crate) fn open(&self, verb: &str, wanted: &[GpaRange]) -> Result<InputMemory> {
        Ok(match &self.file {
            Some(path) => InputMemory::File(DumpFile::open(path)?),
            None => {
                let source = self.source()?;
                InputMemory::View(source.attach(Access::ReadOnly, verb, wanted)?, source.name())
            }
        })
    }

    /// As [`Input::open`], with the registers of the vCPUs or why they are not known. A broker must
    /// run to ask the VMM.
    pub(crate) fn open_with_registers(&self, verb: &str) -> Result<(InputMemory, Registers)> {
        if self.file.is_some() || !self.source()?.is_by_name() || self.source.has_no_broker() {
            let reason = match &self.file {
                Some(_) => "a dump file does not have it",
                None if !self.source.is_by_name() => "a token opens memory alone",
                // Such a broker has only VMs of stock VMMs.
                None => NOT_SHOWN,
            };
            return Ok((self.open(verb, &[])?, Err(reason.to_owned())));
        }
        let (view, operator) = self.source.attach_asking(Access::ReadOnly, verb, &[], false)?;
        let mut operator = operator.context("the view was not attached by name")?;
        let registers = operator.admin.registers(&operator.target);
        let registers = registers.map_err(|error| format!("{:#}", anyhow::Error::new(error)));
        Ok((InputMemory::View(view, self.source.name()), registers))
    }

    /// As [`Input::open`], with the address space that a vCPU uses at this moment, or did when it
    /// was dumped.
    pub(crate) fn open_at_vcpu(
        &self,
        verb: &str,
        number: u32,
    ) -> Result<(InputMemory, AddressSpace)> {
        if let Some(path) = &self.file {
            let file = DumpFile::open(path)?;
            let vcpus = file.vcpus()?;
            ensure!(!vcpus.is_empty(), vcpu::none_in(path));
            return Ok((InputMemory::File(file), vcpu::space(&vcpus, number)?));
        }
        let source = self.source()?;
        ensure!(source.is_by_name(), vcpu::NO_REGISTERS);
        let (view, operator) = source.attach_asking(Access::ReadOnly, verb, &[], true)?;
        let mut operator = operator.context(vcpu::NO_REGISTERS)?;
        let registers = operator.admin.registers(&operator.target);
        let registers =
            registers.with_context(|| format!("cannot get the registers of vCPU {number}"))?;
        let vcpus: Vec<_> = registers.iter().map(vcpu::control).collect();
        Ok((InputMemory::View(view, source.name()), vcpu::space(&vcpus, number)?))
    }

    /// Memory for a few accesses: that in the file, or as [`Source::memory`] has it.
    pub(crate) fn memory(&self, verb: &str, wanted: &[GpaRange]) -> Result<memory::Memory> {
        match &self.file {
            Some(path) => Ok(memory::Memory::File(DumpFile::open(path)?)),
            None => self.source()?.memory(Access::ReadOnly, verb, wanted),
        }
    }

    /// CR3 of the first vCPU, where the file has it or the VMM can be asked. A monitor of QEMU's
    /// serves one client at a time, so this is only for where memory does not decide.
    pub(crate) fn cr3(&self) -> Option<u64> {
        match self.open_at_vcpu("info", 0) {
            Ok((_, space)) => Some(space.cr3),
            Err(error) => {
                tracing::info!("no vCPU tells which kernel runs: {error:#}");
                None
            }
        }
    }

    /// Where memory comes from that is in no file.
    fn source(&self) -> Result<&Source> {
        if !self.source.is_given() {
            return Err(usage(format!(
                "no memory is named: give a dump (--file DUMP) or a running target; {NO_TOKEN}"
            )));
        }
        Ok(&self.source)
    }
}

impl InputMemory {
    pub(crate) fn memory(&self) -> &dyn Memory {
        match self {
            Self::View(view, _) => view,
            Self::File(file) => file,
        }
    }

    /// How errors name the memory: by its target or its file.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::View(_, name) => name.clone(),
            Self::File(file) => file.path().display().to_string(),
        }
    }

    /// CR3 of the first vCPU, where that is in the file.
    pub(crate) fn cr3(&self) -> Option<u64> {
        match self {
            Self::View(..) => None,
            Self::File(file) => file.vcpus().ok()?.first().map(|vcpu| vcpu.cr3),
        }
    }

    pub(crate) fn view(&self) -> Option<&View> {
        match self {
            Self::View(view, _) => Some(view),
            Self::File(_) => None,
        }
    }
}

/// The ranges that can be read, ascending.
pub(crate) fn reached(memory: &dyn Memory) -> Result<Vec<GpaRange>> {
    Ok(memory.ranges()?.into_iter().map(|range| range.gpa..range.end()).collect())
}

/// Bytes in which a thread looks for data at a time.
const CHUNK: usize = 64 << 20;

/// As [`data_within`], for a view: with many threads, where the system can be asked about a part of
/// the memory.
pub(crate) fn data_of_view(
    view: &View,
    parts: &[GpaRange],
    threads: usize,
) -> Result<Vec<GpaRange>> {
    let chunks = parts.iter().flat_map(|part| {
        (part.start..part.end).step_by(CHUNK).map(|start| start..part.end.min(start + CHUNK as u64))
    });
    let mut data: Option<Vec<GpaRange>> = Some(Vec::new());
    let work = |chunk: GpaRange, sink: &Sink<_>| {
        sink.send((
            chunk.start,
            view.data_in(Range { gpa: chunk.start, len: chunk.end - chunk.start })?,
        ))
    };
    in_order(threads, chunks, work, |(start, found)| {
        let Some((data, found)) = data.as_mut().zip(found) else {
            data = None;
            return Ok(ControlFlow::Break(()));
        };
        for range in found {
            match data.last_mut() {
                // Over the end of a chunk, but not of a part.
                Some(last)
                    if last.end == range.gpa && range.gpa == start && !is_start(parts, start) =>
                {
                    last.end = range.end();
                }
                _ => data.push(range.gpa..range.end()),
            }
        }
        Ok(ControlFlow::Continue(()))
    })?;
    data.map_or_else(|| data_within(view, parts), Ok)
}

fn is_start(parts: &[GpaRange], gpa: u64) -> bool {
    parts.binary_search_by_key(&gpa, |part| part.start).is_ok()
}

/// The parts of `parts`, which ascend, that hold data. Only these are worth reading, and reading
/// others could make the target's host provide memory for them.
pub(crate) fn data_within(memory: &dyn Memory, parts: &[GpaRange]) -> Result<Vec<GpaRange>> {
    let mut data = Vec::new();
    for part in parts {
        let mut at = part.start;
        while at < part.end {
            let Some(range) = memory.data_from(at)? else { break };
            let range = range.gpa.max(at)..range.end().min(part.end);
            // A backend that goes back would be asked for ever.
            at = range.end.max(at + 1);
            if !range.is_empty() {
                data.push(range);
            }
        }
    }
    Ok(data)
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The page tables in which guest-virtual addresses are looked up: those of a CR3 or a vCPU, or
//! those of a Linux guest's kernel or of one of its processes, which are searched for.

use anyhow::{Context, Result};
use clap::Args;
use kvmmem_linux::maps::Maps;
use kvmmem_linux::tasks::Task;
use kvmmem_linux::{Kernel, Space, SpaceError};
use kvmmem_memory::paging::{Absent, WalkError};

use crate::failure::usage;
use crate::input::{Input, InputMemory};
use crate::linux::{Choice, RestartCheck, process, with_kernel};
use crate::number::{Address, Hex, integer, parse};
use crate::page_tables::with_remedy;

/// Options of verbs that take guest-virtual addresses.
#[derive(Args, Clone, Copy)]
pub(crate) struct Virtual {
    /// Addresses are guest-virtual, of this process of a Linux guest
    #[arg(long, value_name = "PID", conflicts_with = "cr3", value_parser = integer(0..=u32::MAX))]
    pub(crate) pid: Option<u32>,

    /// Addresses are guest-virtual, by the page tables of this CR3, or of the outermost table at
    /// this address; kernel: by those of the Linux kernel that is found
    #[arg(long, value_name = "CR3", value_parser = parse_root)]
    pub(crate) cr3: Option<Root>,

    /// Addresses are guest-virtual, by the page tables that this vCPU uses: the first one is 0.
    /// Its registers come with --target, or from an ELF dump
    #[arg(long, value_name = "N", conflicts_with_all = ["pid", "cr3"], value_parser = integer(0..=u32::MAX))]
    pub(crate) vcpu: Option<u32>,

    /// With --pid or kernel: of several kernels, the one whose VMCOREINFO note is at this
    /// guest-physical address
    #[arg(long, value_name = "GPA", value_parser = parse, conflicts_with = "kernel")]
    pub(crate) note: Option<u64>,

    /// With --pid or --cr3 kernel: of several kernels, the one in the address space of this CR3,
    /// its own or that of one of its processes
    #[arg(long, value_name = "CR3", value_parser = parse)]
    pub(crate) kernel: Option<u64>,
}

/// The outermost page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Root {
    /// That of the Linux kernel.
    Kernel,
    /// That of this CR3.
    At(u64),
}

/// Reads a [`Root`].
pub(crate) fn parse_root(text: &str) -> Result<Root, String> {
    if text == "kernel" { Ok(Root::Kernel) } else { parse(text).map(Root::At) }
}

/// An address space of a Linux guest, as the command line names it.
#[derive(Clone, Copy)]
pub(crate) struct Linux {
    /// The process, or else the kernel.
    pub(crate) pid: Option<u32>,
    choice: Choice,
}

impl Virtual {
    /// An address that the command line has, or that follows one.
    pub(crate) fn address(&self, at: u64) -> Address {
        if self.is_given() { Address::Gva(Hex(at)) } else { Address::Gpa(Hex(at)) }
    }

    /// Whether addresses are guest-virtual.
    pub(crate) fn is_given(&self) -> bool {
        self.pid.is_some() || self.cr3.is_some() || self.vcpu.is_some()
    }

    /// CR3, where the command line has it.
    pub(crate) fn cr3(&self) -> Option<u64> {
        match self.cr3 {
            Some(Root::At(cr3)) => Some(cr3),
            _ => None,
        }
    }

    /// The address space of a Linux guest; `None` for others.
    pub(crate) fn linux(&self) -> Result<Option<Linux>> {
        let Self { pid, cr3, note, kernel, .. } = *self;
        let choice = Choice { note, kernel };
        match (pid, cr3) {
            (None, None | Some(Root::At(_))) if choice.is_given() => {
                let option = if note.is_some() { "--note" } else { "--kernel" };
                Err(usage(format!(
                    "{option} chooses the kernel for --pid PID and --cr3 kernel: give one of them"
                )))
            }
            (None, None | Some(Root::At(_))) => Ok(None),
            _ => Ok(Some(Linux { pid, choice })),
        }
    }
}

impl Linux {
    /// Hands `read` the kernel, and the check that the guest is not restarted meanwhile.
    pub(crate) fn with_kernel<R>(
        &self,
        input: &Input,
        opened: &InputMemory,
        read: impl FnOnce(&Kernel<'_>, &RestartCheck<'_>) -> Result<R>,
    ) -> Result<R> {
        with_kernel(input, opened, self.choice, read)
    }
}

/// An address space of a Linux guest.
pub(crate) struct LinuxSpace<'k> {
    kernel: &'k Kernel<'k>,
    pub(crate) space: Space<'k>,
    /// Whose it is, unless it is the kernel's.
    pub(crate) task: Option<Task>,
    /// The words that name the guest on the command line.
    arguments: String,
}

impl<'k> LinuxSpace<'k> {
    pub(crate) fn new(kernel: &'k Kernel<'k>, linux: &Linux, input: &Input) -> Result<Self> {
        let arguments = input.arguments();
        let Some(pid) = linux.pid else {
            let space = kernel.space();
            return Ok(Self {
                kernel,
                space: space.with_root(space.root().cr3),
                task: None,
                arguments,
            });
        };
        let task = process(kernel, pid, &arguments)?;
        let space = kernel
            .space_of(&task)
            .with_context(|| format!("cannot find the memory of process {pid}"))?;
        Ok(Self { kernel, space, task: Some(task), arguments })
    }

    /// Reads as much as can be; returns how many bytes that is, and why there are not more.
    pub(crate) fn read(&self, gva: u64, buf: &mut [u8]) -> (usize, Option<anyhow::Error>) {
        let Err(error) = self.space.read(gva, buf) else { return (buf.len(), None) };
        let end = error.gva();
        let count = usize::try_from(end.wrapping_sub(gva)).unwrap_or(0).min(buf.len());
        let remedy = self.remedy(&error);
        (count, Some(with_remedy(end, error, &remedy)))
    }

    /// The process's mapping at an address that is not present; empty where it is not known.
    pub(crate) fn remedy(&self, error: &SpaceError) -> String {
        let WalkError::NotPresent { gva, entry } = error else { return String::new() };
        let (Some(task), None | Some(Absent::Unknown)) = (&self.task, entry.absent(*gva)) else {
            return String::new();
        };
        let Ok(map) = Maps::new(self.kernel).and_then(|maps| maps.of(task)) else {
            return String::new();
        };
        match map.find(*gva) {
            Some(mapping) => {
                let path = mapping.file.as_ref().map(|file| file.path.text.as_str());
                let name = path.or(mapping.label.as_deref()).unwrap_or("anonymous memory");
                format!(
                    "; the process has {} ({name}) there, but that page is not in memory: it was never used, was swapped \
                     out, or is still in its file",
                    mapping.permissions()
                )
            }
            None => {
                let (pid, arguments) = (task.pid, &self.arguments);
                format!(
                    "; process {pid} has nothing mapped there: see kvmmem maps {pid}{arguments}"
                )
            }
        }
    }
}

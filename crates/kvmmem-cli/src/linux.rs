// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Linux guest that a verb is about: a target's memory, or that in a dump file, and the kernel in it.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use kvmmem::view::Access;
use kvmmem_linux::{Find, FindError, Kernel};
use kvmmem_memory::{DumpFile, Memory};

use crate::number::parse;
use crate::source::Source;
use crate::target_name::TargetName;

/// Walks of a list that changes, before its error counts.
const TRIES: u32 = 3;

#[derive(Args)]
pub(crate) struct Guest {
    /// A dump file instead of a target: raw memory, with the record of kvmmem dump beside it if there is one, an ELF core
    /// or LiME
    #[arg(long, value_name = "DUMP", conflicts_with_all = ["target", "token", "token_file", "listen", "device", "broker"])]
    file: Option<PathBuf>,

    /// Of several kernels, the one whose VMCOREINFO note is at this guest-physical address
    #[arg(long, value_name = "GPA", value_parser = parse)]
    note: Option<u64>,

    #[command(flatten)]
    source: Source,
}

impl Guest {
    /// That of a target of this host.
    pub(crate) fn of_target(target: TargetName) -> Self {
        Self { file: None, note: None, source: Source::of_target(target) }
    }

    /// Whether the guest may run.
    pub(crate) fn is_live(&self) -> bool {
        self.file.is_none()
    }

    /// Hands `read` the kernel. `verb` is for the audit log.
    pub(crate) fn with_kernel<R>(
        &self,
        verb: &str,
        read: impl FnOnce(&Kernel<'_>) -> Result<R>,
    ) -> Result<R> {
        let memory: Box<dyn Memory> = match &self.file {
            Some(path) => Box::new(DumpFile::open(path)?),
            None => Box::new(self.source.attach(Access::ReadOnly, verb, &[])?),
        };
        let find = Find { is_live: self.is_live(), note: self.note, ..Find::default() };
        let kernel = Kernel::find(memory.as_ref(), find).map_err(|error| match error {
            FindError::Ambiguous { .. } => anyhow::Error::new(error).context("say which kernel: --note GPA"),
            error => error.into(),
        })?;
        read(&kernel)
    }
}

/// Walks a list to its end, again where it changes under way.
pub(crate) fn collect<T, E, I>(walk: impl Fn() -> Result<I, E>) -> Result<Vec<T>, E>
where
    I: Iterator<Item = Result<T, E>>,
{
    let walk = || walk().and_then(Iterator::collect);
    let mut result = walk();
    for _ in 1..TRIES {
        if result.is_ok() {
            break;
        }
        result = walk();
    }
    result
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Linux guest that a verb is about: a target's memory, or that in a dump file, and the kernel in it.

use anyhow::Result;
use clap::Args;
use kvmmem_linux::{Find, FindError, Kernel};
use kvmmem_memory::Memory;

use crate::input::Input;
use crate::number::parse;
use crate::target_name::TargetName;

/// Walks of a list that changes, before its error counts.
const TRIES: u32 = 3;

#[derive(Args)]
pub(crate) struct Guest {
    /// Of several kernels, the one whose VMCOREINFO note is at this guest-physical address
    #[arg(long, value_name = "GPA", value_parser = parse)]
    note: Option<u64>,

    #[command(flatten)]
    input: Input,
}

impl Guest {
    /// That of a target of this host.
    pub(crate) fn of_target(target: TargetName) -> Self {
        Self { note: None, input: Input::of_target(target) }
    }

    /// Whether the guest may run.
    pub(crate) fn is_live(&self) -> bool {
        self.input.is_live()
    }

    /// Hands `read` the kernel. `verb` is for the audit log.
    pub(crate) fn with_kernel<R>(
        &self,
        verb: &str,
        read: impl FnOnce(&Kernel<'_>) -> Result<R>,
    ) -> Result<R> {
        let opened = self.input.open(verb, &[])?;
        read(&find(opened.memory(), self.is_live(), self.note)?)
    }
}

/// Finds the kernel in memory, which is a running target's or not; `note` is where the user says its VMCOREINFO note is.
pub(crate) fn find(memory: &dyn Memory, is_live: bool, note: Option<u64>) -> Result<Kernel<'_>> {
    Kernel::find(memory, Find { is_live, note, ..Find::default() }).map_err(|error| match error {
        FindError::Ambiguous { .. } => anyhow::Error::new(error).context("say which kernel: --note GPA"),
        error => error.into(),
    })
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

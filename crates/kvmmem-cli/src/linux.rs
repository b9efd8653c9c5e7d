// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Linux guest that a verb is about: a target's memory, or that in a dump file, and the kernel in it.

mod explain;

use anyhow::Result;
use clap::Args;
use kvmmem_linux::{Find, Kernel};
use kvmmem_memory::Memory;

use crate::failure;
use crate::input::{Input, Opened};
use crate::number::parse;
use crate::target_name::TargetName;
use explain::explain;

/// Exit code where some of what was asked for was not found, or is damaged, and the rest was printed.
pub(crate) const INCOMPLETE: u8 = 3;

/// Exit code where the guest was restarted while it was read.
const RESTARTED: u8 = 4;

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
        let result = with_kernel(&opened.name(), opened.memory(), self.is_live(), self.note, read);
        result.map_err(|error| explain(error, &opened))
    }
}

/// Hands `read` the kernel that is in the memory of the guest with this name.
fn with_kernel<R>(
    name: &str,
    memory: &dyn Memory,
    is_live: bool,
    note: Option<u64>,
    read: impl FnOnce(&Kernel<'_>) -> Result<R>,
) -> Result<R> {
    let kernel = find_in(memory, is_live, note)?;
    let result = read(&kernel);
    // Whatever was read of a kernel that is no more, also what made sense, may be made up of two.
    if is_live && matches!(kernel.is_in_memory(), Ok(false)) {
        let restarted = "the guest was restarted while it was read: run the command again";
        return Err(failure::exit(RESTARTED, format!("{name}: {restarted}")));
    }
    result
}

/// Finds the kernel in the memory of a target, which may run, or of a dump; `note` is where the user says its VMCOREINFO note is.
pub(crate) fn find(opened: &Opened, note: Option<u64>) -> Result<Kernel<'_>> {
    let found = find_in(opened.memory(), opened.view().is_some(), note);
    found.map_err(|error| explain(error, opened))
}

fn find_in(memory: &dyn Memory, is_live: bool, note: Option<u64>) -> Result<Kernel<'_>> {
    Ok(Kernel::find(memory, Find { is_live, note, ..Find::default() })?)
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

/// Guests in which a builder wrote a kernel.
#[cfg(test)]
#[path = "../../kvmmem-linux/tests/common/mod.rs"]
mod common;

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::common::{Guest, PAGE_TABLES, Place};
    use super::*;

    #[test]
    fn a_guest_that_is_restarted_while_it_is_read_is_one_clear_line() {
        let Place { gpa, .. } = Place::FIRST;
        let guest = Guest::with(&[Place::FIRST]);
        let restart = || {
            guest.put(gpa + PAGE_TABLES, &[0; 0x1000]);
            guest.boot(&Place::SECOND);
        };
        for fails in [true, false] {
            guest.put(0, &vec![0; common::RAM]);
            guest.boot(&Place::FIRST);
            let error = with_kernel("web-1", &guest, true, None, |_| {
                restart();
                if fails {
                    bail!("garbage")
                }
                Ok(())
            });
            let error = error.unwrap_err();
            assert_eq!(failure::exit_code(&error), Some(RESTARTED));
            let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
            assert_eq!(chain, ["web-1: the guest was restarted while it was read: run the command again"]);
        }
        // Other errors stay what they are.
        let other = |_: &Kernel<'_>| -> Result<()> { bail!("garbage") };
        let error = with_kernel("web-1", &guest, true, Some(Place::SECOND.note), other).unwrap_err();
        assert_eq!(error.to_string(), "garbage");
    }
}

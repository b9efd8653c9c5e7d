// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Linux guest that a verb is about: a target's memory, or that in a dump file, and the kernel
//! in it.

mod choice;
mod damage;
mod explain;
mod list;

use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::Args;
use kvmmem_linux::tasks::{Task, Tasks, Which};
use kvmmem_linux::{Find, FindError, Kernel, KernelError};
use kvmmem_memory::Memory;

use crate::failure;
use crate::input::{Input, InputMemory, Registers};
use crate::number::parse;
use crate::target_name::TargetName;
pub(crate) use choice::Choice;
pub(crate) use damage::Damage;
pub(crate) use explain::explain;
pub(crate) use list::{Listing, collect};

/// Exit code where some of what was asked for was not found, or is damaged, and the rest was
/// printed.
pub(crate) const INCOMPLETE: u8 = 3;

/// Exit code where the guest was restarted while it was read.
const RESTARTED: u8 = 4;

#[derive(Args)]
pub(crate) struct Guest {
    /// Of several kernels, the one whose VMCOREINFO note is at this guest-physical address
    #[arg(long, value_name = "GPA", value_parser = parse, conflicts_with = "kernel")]
    note: Option<u64>,

    /// Of several kernels, the one in the address space of this CR3, its own or that of one of its
    /// processes; it needs no note
    #[arg(long, value_name = "CR3", value_parser = parse)]
    kernel: Option<u64>,

    #[command(flatten)]
    input: Input,
}

impl Guest {
    /// That of a target of this host.
    pub(crate) fn of_target(target: TargetName) -> Self {
        Self { note: None, kernel: None, input: Input::of_target(target) }
    }

    /// Whether the guest may run.
    pub(crate) fn is_live(&self) -> bool {
        self.input.is_live()
    }

    /// The words that name the guest on the command line.
    pub(crate) fn arguments(&self) -> String {
        self.input.arguments()
    }

    /// How a verb ends that has printed all but what is damaged.
    pub(crate) fn end(&self, damage: Damage) -> Result<ExitCode> {
        let Damage { mut missing, marked } = damage;
        if marked > 0 {
            let rows = if marked == 1 { "row" } else { "rows" };
            missing.push(format!("{marked} {rows} in part, marked with ?"));
        }
        if missing.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        let why = match self.is_live() {
            true => "the guest's memory is damaged, or changed whenever it was read",
            false => "the dump is damaged, or the guest ran while it was made",
        };
        Err(failure::exit(INCOMPLETE, format!("could not be read: {}: {why}", missing.join("; "))))
    }

    /// Hands `read` the kernel. `verb` is for the audit log.
    pub(crate) fn with_kernel<R>(
        &self,
        verb: &str,
        read: impl FnOnce(&Kernel<'_>) -> Result<R>,
    ) -> Result<R> {
        self.with_kernel_of(&self.input.open(verb, &[])?, read)
    }

    /// As [`Guest::with_kernel`], with the registers of the vCPUs or why they are not known.
    pub(crate) fn with_kernel_and_registers<R>(
        &self,
        verb: &str,
        read: impl FnOnce(&Kernel<'_>, &Registers) -> Result<R>,
    ) -> Result<R> {
        let (opened, registers) = self.input.open_with_registers(verb)?;
        self.with_kernel_of(&opened, |kernel| read(kernel, &registers))
    }

    fn with_kernel_of<R>(
        &self,
        opened: &InputMemory,
        read: impl FnOnce(&Kernel<'_>) -> Result<R>,
    ) -> Result<R> {
        let choice = Choice { note: self.note, kernel: self.kernel };
        let find = |_: &dyn Memory| find_in(&self.input, opened, choice);
        let result = with_kernel(&opened.name(), opened.memory(), self.is_live(), find, read);
        result.map_err(|error| explain(error, opened))
    }
}

/// Hands `read` the kernel that `find` finds in the memory of the guest with this name.
fn with_kernel<'m, R>(
    name: &str,
    memory: &'m dyn Memory,
    is_live: bool,
    find: impl FnOnce(&'m dyn Memory) -> Result<Kernel<'m>, FindError>,
    read: impl FnOnce(&Kernel<'_>) -> Result<R>,
) -> Result<R> {
    let kernel = find(memory)?;
    let result = read(&kernel);
    // The kernel is gone: the result, even one that makes sense, may mix two kernels.
    if is_live && matches!(kernel.is_in_memory(), Ok(false)) {
        let restarted = "the guest was restarted while it was read: run the command again";
        return Err(failure::exit(RESTARTED, format!("{name}: {restarted}")));
    }
    result
}

/// Finds the kernel in the memory that `input` has opened: that of a target, which may run, or of a
/// dump.
pub(crate) fn find<'m>(
    input: &Input,
    opened: &'m InputMemory,
    choice: Choice,
) -> Result<Kernel<'m>> {
    find_in(input, opened, choice).map_err(|error| explain(error.into(), opened))
}

fn find_in<'m>(
    input: &Input,
    opened: &'m InputMemory,
    choice: Choice,
) -> Result<Kernel<'m>, FindError> {
    let find = Find { cr3: opened.cr3(), ..choice.find(opened.view().is_some()) };
    match Kernel::find(opened.memory(), find) {
        // Where memory does not decide, a vCPU does.
        Err(error @ (FindError::Ambiguous { .. } | FindError::TooMany)) => match input.cr3() {
            Some(cr3) => {
                Kernel::find(opened.memory(), Find { cr3: Some(cr3), is_live: false, ..find })
            }
            None => Err(error),
        },
        found => found,
    }
}

/// The process with this number. `arguments` name the guest on the command line.
pub(crate) fn process(kernel: &Kernel<'_>, pid: u32, arguments: &str) -> Result<Task> {
    kernel.task(pid).map_err(|error| match error {
        KernelError::NoProcess { .. } => anyhow!(no_process(kernel, pid, arguments)),
        error => error.into(),
    })
}

/// Why the guest has no process of this number, and what to do next.
pub(crate) fn no_process(kernel: &Kernel<'_>, pid: u32, arguments: &str) -> String {
    let threads = Tasks::new(kernel, Which::Threads).into_iter().flatten();
    match threads.filter_map(Result::ok).find(|task| task.tid == pid && task.pid != pid) {
        Some(Task { pid: of, .. }) => {
            format!("{pid} is a thread of process {of}: give {of} instead")
        }
        None => format!("the guest has no process {pid}; its processes: kvmmem ps{arguments}"),
    }
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
    fn what_is_missing_has_an_exit_code_of_its_own() {
        let guest = super::Guest::of_target(TargetName::Pid(1));
        assert_eq!(guest.end(Damage::default()).unwrap(), ExitCode::SUCCESS);
        let mut damage = Damage::default();
        damage.missing(0, "module", "modules");
        damage.missing(2, "process", "processes");
        damage.marked([true, false]);
        let error = guest.end(damage).unwrap_err();
        assert_eq!(failure::exit_code(&error), Some(INCOMPLETE));
        assert_eq!(
            error.to_string(),
            "could not be read: at least 2 processes; 1 row in part, marked with ?: the guest's memory is damaged, or changed \
             whenever it was read"
        );
    }

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
            let find = |memory| Kernel::find(memory, Find::default());
            let error = with_kernel("web-1", &guest, true, find, |_| {
                restart();
                if fails {
                    bail!("garbage")
                }
                Ok(())
            });
            let error = error.unwrap_err();
            assert_eq!(failure::exit_code(&error), Some(RESTARTED));
            let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
            assert_eq!(
                chain,
                ["web-1: the guest was restarted while it was read: run the command again"]
            );
        }
        // Other errors stay what they are.
        let other = |_: &Kernel<'_>| -> Result<()> { bail!("garbage") };
        let second = Find { note: Some(Place::SECOND.note), ..Find::default() };
        let error =
            with_kernel("web-1", &guest, true, |memory| Kernel::find(memory, second), other)
                .unwrap_err();
        assert_eq!(error.to_string(), "garbage");
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Linux guest that a verb is about: a target's memory, or that in a dump file, and the kernel
//! in it.

mod choice;
mod damage;
mod explain;
mod list;
mod restart;

use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::Args;
use kvmmem_linux::tasks::{Task, Tasks, Which};
use kvmmem_linux::{Find, FindError, Kernel, KernelError};

use crate::failure;
use crate::input::{Input, InputMemory, Registers};
use crate::number::parse;
use crate::target_name::TargetName;
pub(crate) use choice::Choice;
pub(crate) use damage::Damage;
pub(crate) use explain::explain;
pub(crate) use list::{Listing, collect};
pub(crate) use restart::RestartCheck;

/// Exit code where some of what was asked for was not found, or is damaged, and the rest was
/// printed.
pub(crate) const INCOMPLETE: u8 = 3;

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
        with_kernel(&self.input, opened, choice, |kernel, _| {
            read(kernel).map_err(|error| explain(error, opened))
        })
    }
}

/// Hands `read` the kernel in the memory that `input` has opened, that of a target, which may run,
/// or of a dump; and the check that the guest is not restarted, which comes last in any case.
pub(crate) fn with_kernel<R>(
    input: &Input,
    opened: &InputMemory,
    choice: Choice,
    read: impl FnOnce(&Kernel<'_>, &RestartCheck<'_>) -> Result<R>,
) -> Result<R> {
    let restart = RestartCheck::begin(opened)?;
    let kernel = find(input, opened, choice).map_err(|error| explain(error.into(), opened))?;
    let result = read(&kernel, &restart);
    restart.settle(Some(&kernel), result)
}

fn find<'m>(
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
}

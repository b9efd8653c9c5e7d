// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether a kernel was tampered with in the ways that rootkits use: entries that lead out of the
//! kernel's text or to a function of another purpose, and modules and processes that were taken out
//! of one of the two structures that have them.
//!
//! | check | what is compared | module |
//! |---|---|---|
//! | system calls | `sys_call_table` with the names of system calls' handlers | `entries` |
//! | dispatcher | branches of `x64_sys_call` with the kernel's text | `entries` |
//! | interrupts | gates of `idt_table` with the names of interrupts' handlers | `entries` |
//! | modules | the list of modules with `/sys/module` | `modules` |
//! | tasks | the lists of processes and threads with the pids | `tasks` |
//!
//! A guest that runs adds and removes modules and tasks while they are compared: what is found once
//! and not again was such a change. All that is compared is the guest's own word, so that nothing
//! found does not mean that nothing is there.

mod calls;
mod entries;
mod finding;
mod modules;
mod tasks;

use crate::kernel::{Kernel, KernelError};
pub use finding::{Finding, Place, Report};

/// A check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Check {
    /// Entries of the table of system calls.
    SystemCalls,
    /// Calls of handlers of system calls, by the function that has taken the table's place in 6.9
    /// and stable releases since.
    Dispatcher,
    /// Handlers of interrupts and exceptions.
    Interrupts,
    /// Modules that are only in one of the two places that have them.
    Modules,
    /// Processes and threads that are only in one of the two places that have them.
    Tasks,
}

impl Check {
    /// All checks.
    pub const ALL: [Self; 5] =
        [Self::SystemCalls, Self::Dispatcher, Self::Interrupts, Self::Modules, Self::Tasks];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::SystemCalls => "system-calls",
            Self::Dispatcher => "dispatcher",
            Self::Interrupts => "interrupts",
            Self::Modules => "modules",
            Self::Tasks => "tasks",
        }
    }

    /// Whether a kernel has what is checked. Older ones have no dispatcher, and one may be built
    /// without modules.
    pub fn applies(self, kernel: &Kernel<'_>) -> bool {
        match self {
            Self::Dispatcher => kernel.symbol(entries::DISPATCHER).is_ok(),
            Self::Modules => kernel.symbol(modules::LIST).is_ok(),
            _ => true,
        }
    }

    /// Checks a kernel.
    ///
    /// # Errors
    /// [`KernelError`]: what is to be compared cannot be read to its end.
    pub fn run(self, kernel: &Kernel<'_>) -> Result<Report, KernelError> {
        match self {
            Self::SystemCalls => entries::system_calls(kernel),
            Self::Dispatcher => entries::dispatcher(kernel),
            Self::Interrupts => entries::interrupts(kernel),
            Self::Modules => modules::check(kernel),
            Self::Tasks => tasks::check(kernel),
        }
    }
}

/// Checks MSR_LSTAR, where a vCPU enters the kernel at a system call: the values and what to call
/// each.
///
/// # Errors
/// [`KernelError`].
pub fn check_lstar(kernel: &Kernel<'_>, values: &[(String, u64)]) -> Result<Report, KernelError> {
    let mut report = Report { examined: values.len(), findings: Vec::new() };
    let wanted = kernel.symbol("entry_SYSCALL_64")?;
    for (entry, target) in values.iter().filter(|(_, target)| *target != wanted) {
        let place = Place::of(kernel, &modules::all(kernel), *target);
        report.findings.push(Finding::Hook {
            entry: entry.clone(),
            gva: None,
            target: *target,
            place,
        });
    }
    Ok(report)
}

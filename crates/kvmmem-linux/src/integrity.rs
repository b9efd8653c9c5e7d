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
mod modules;
mod tasks;

use crate::kernel::{Kernel, KernelError};
use crate::modules::{Module, Modules, Reader};

/// The most modules that are looked at for the name of one.
const MAX_MODULES: usize = 4096;

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

/// What a check has looked at, and found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many entries, modules or tasks there are.
    pub examined: usize,
    /// What is not as it should be.
    pub findings: Vec<Finding>,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Finding {
    /// An entry leads where it should not.
    Hook {
        /// The entry, for example `system call 0`.
        entry: String,
        /// Where it is; a register is nowhere.
        gva: Option<u64>,
        /// Where it leads.
        target: u64,
        /// What is there.
        place: Place,
    },
    /// A module or task is not where it should be as well.
    Hidden {
        /// What it is called, for example `module dummy`; control characters may be there.
        name: String,
        /// Where its structure is.
        gva: u64,
        /// Where it was found.
        found: &'static str,
        /// Where it was not.
        missing: &'static str,
    },
}

/// What is at an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The kernel's text: the nearest symbol at or below it, and how far from it.
    Text {
        /// The symbol.
        symbol: String,
        /// Bytes from it.
        offset: u64,
    },
    /// A module's memory.
    Module(String),
    /// Neither.
    Elsewhere,
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
        let place = Place::of(kernel, &modules_of(kernel), *target);
        report.findings.push(Finding::Hook {
            entry: entry.clone(),
            gva: None,
            target: *target,
            place,
        });
    }
    Ok(report)
}

impl Place {
    /// What is at an address of a kernel that has these modules.
    fn of(kernel: &Kernel<'_>, modules: &[Module], gva: u64) -> Self {
        let text = || {
            let symbols = kernel.symbols().ok()?;
            (symbols.get("_stext")?..symbols.get("_etext")?)
                .contains(&gva)
                .then(|| symbols.nearest(gva))?
        };
        if let Some(symbol) = text() {
            return Self::Text { offset: gva - symbol.address, symbol: symbol.name };
        }
        let has = |module: &&Module| {
            module.parts.iter().any(|(base, size)| gva.wrapping_sub(*base) < *size)
        };
        modules.iter().find(has).map_or(Self::Elsewhere, |module| Self::Module(module.name.clone()))
    }
}

/// The modules, those among them that only /sys/module has, as far as they can be read: they are
/// for names alone.
fn modules_of(kernel: &Kernel<'_>) -> Vec<Module> {
    let Ok(listed) = Modules::new(kernel) else { return Vec::new() };
    let mut modules: Vec<_> = listed.filter_map(Result::ok).take(MAX_MODULES).collect();
    if let (Ok(reader), Ok(in_sysfs)) = (Reader::new(kernel), modules::in_sysfs(kernel)) {
        let more =
            in_sysfs.into_keys().filter(|gva| modules.iter().all(|module| module.gva != *gva));
        let more: Vec<_> =
            more.take(MAX_MODULES).filter_map(|gva| reader.module(gva).ok()?).collect();
        modules.extend(more);
    }
    modules
}

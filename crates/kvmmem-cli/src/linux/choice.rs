// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which of several kernels is meant, as the command line names it, and the commands that would
//! name each.

use kvmmem_linux::Find;
use kvmmem_linux::kernel::Candidate;

use crate::shell::quote;

/// A kernel that the user names, by one or none of these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Where its VMCOREINFO note is.
    pub(crate) note: Option<u64>,
    /// CR3 of its own address space, or of one of its processes.
    pub(crate) kernel: Option<u64>,
}

impl Choice {
    /// Whether a kernel is named.
    pub(crate) fn is_given(&self) -> bool {
        self.note.is_some() || self.kernel.is_some()
    }

    /// How to find it.
    pub(super) fn find(self, is_live: bool) -> Find {
        let Self { note, kernel } = self;
        Find { is_live, note, kernel, ..Find::default() }
    }
}

/// This process's command line with the option that chooses the kernel. A token on it is not
/// repeated.
pub(super) fn command(Candidate { note, cr3 }: &Candidate) -> String {
    let option = match note.gpa {
        Some(gpa) => format!("--note {gpa:#x}"),
        None => format!("--kernel {cr3:#x}"),
    };
    let mut words: Vec<String> = Vec::new();
    for word in std::env::args_os().skip(1) {
        let text = word.to_string_lossy();
        if text == "--token" || text.starts_with("--token=") {
            return option;
        }
        words.push(quote(&word));
    }
    format!("kvmmem {} {option}", words.join(" "))
}

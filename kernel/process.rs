// SPDX-License-Identifier: GPL-2.0-only
//! Process: the mapping table that the open files of one process share.
//!
//! There is one [`Process`] for each `mm_struct` that has used v1 through an open file, found and
//! counted by the kernel's MMU notifiers (see [`crate::sys::notifier`]). They hold the
//! `mm_struct` but not its memory (mmgrab), and report when the process ends or executes another
//! program, even if another process still has its files open.

use kernel::prelude::*;
use kernel::sync::{new_mutex, Mutex};

use crate::page::ForeignPage;
use crate::sys::notifier::{MmData, MmKind};
use crate::table::ops::{self, Shared};
use crate::table::table::Table;
use crate::tree::Trees;

/// The mapping table of a process, shared by its open files.
#[pin_data]
pub(crate) struct Process {
    #[pin]
    table: Mutex<Table<ForeignPage, Trees>>,
}

/// The processes that use v1.
pub(crate) static PROCESSES: MmKind<Process> = MmKind::new();

impl MmData for Process {
    /// A process without files or mappings.
    fn new() -> impl PinInit<Self> {
        pin_init!(Self { table <- new_mutex!(Table::default(), "kvmmem_table") })
    }

    /// Undoes all of its mappings, of every file.
    fn exited(&self) {
        ops::die(self);
    }
}

impl Shared for Process {
    type Page = ForeignPage;
    type Maps = Trees;

    fn with<R>(&self, transition: impl FnOnce(&mut Table<ForeignPage, Trees>) -> R) -> R {
        transition(&mut self.table.lock())
    }
}

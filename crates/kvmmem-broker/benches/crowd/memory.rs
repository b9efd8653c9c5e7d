// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a process takes up, its own memory and the kernel's.

use std::fmt;
use std::ops::Sub;

use crate::Result;

/// What the kernel has for a thread on x86-64, bytes: a stack of 16 KiB, the task (5.7) and its
/// mappings. It is not reported, so it is counted as this.
const THREAD: f64 = 22.5 * 1024.0;

/// What the kernel has for an open file, bytes: of a target's two, its socket takes 2.2 KiB, its
/// memfd 0.8, and 1.5 are those of the files themselves and of waiting for the socket.
const FILE: f64 = 4.5 * 1024.0 / 2.0;

/// Memory of a process, bytes, and how many threads and open files it has.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    resident: f64,
    page_tables: f64,
    threads: f64,
    files: f64,
}

impl Memory {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let word = line.and_then(|line| line.split_whitespace().next());
            Ok(word.ok_or_else(|| format!("process {pid} has no {name}"))?.parse()?)
        };
        let files = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        Ok(Self {
            resident: field("VmRSS")? * 1024.0,
            page_tables: field("VmPTE")? * 1024.0,
            threads: field("Threads")?,
            files: files as f64,
        })
    }

    pub(crate) fn bytes(self) -> f64 {
        self.resident + self.page_tables + self.kernel()
    }

    fn kernel(self) -> f64 {
        self.threads * THREAD + self.files * FILE
    }

    pub(crate) fn shared_by(self, count: usize) -> Self {
        let share = |bytes: f64| bytes / count as f64;
        Self {
            resident: share(self.resident),
            page_tables: share(self.page_tables),
            threads: share(self.threads),
            files: share(self.files),
        }
    }
}

impl Sub for Memory {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            resident: self.resident - before.resident,
            page_tables: self.page_tables - before.page_tables,
            threads: self.threads - before.threads,
            files: self.files - before.files,
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resident, page_tables, .. } = self;
        write!(
            f,
            "{resident:.0} resident, {page_tables:.0} of page tables, {:.0} of the kernel's",
            self.kernel()
        )
    }
}

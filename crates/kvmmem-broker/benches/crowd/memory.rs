// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a process takes up, its own memory and the kernel's.

use std::fmt;
use std::ops::Sub;

use crate::Result;

/// What the kernel has for a target's thread on x86-64: a stack, and about 10 KiB of objects with
/// the socket and the memfd that it serves (task 5.7, socket 2.2, memfd 0.8, mappings, files and
/// the rest 1.3). It is not reported, so it is counted as this.
const KERNEL: f64 = 26_624.0;

/// Memory of a process, bytes, and how many threads it has.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    resident: f64,
    page_tables: f64,
    threads: f64,
}

impl Memory {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let word = line.and_then(|line| line.split_whitespace().next());
            Ok(word.ok_or_else(|| format!("process {pid} has no {name}"))?.parse()?)
        };
        Ok(Self {
            resident: field("VmRSS")? * 1024.0,
            page_tables: field("VmPTE")? * 1024.0,
            threads: field("Threads")?,
        })
    }

    pub(crate) fn bytes(self) -> f64 {
        self.resident + self.page_tables + self.threads * KERNEL
    }

    pub(crate) fn shared_by(self, count: usize) -> Self {
        let share = |bytes: f64| bytes / count as f64;
        Self {
            resident: share(self.resident),
            page_tables: share(self.page_tables),
            threads: share(self.threads),
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
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resident, page_tables, threads } = self;
        write!(
            f,
            "{resident:.0} resident, {page_tables:.0} of page tables, {:.0} of the kernel's",
            threads * KERNEL
        )
    }
}

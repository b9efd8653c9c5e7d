// SPDX-License-Identifier: GPL-2.0-only
//! Counters of the whole module, shown in debugfs as `kvmmem/counters`.

use kernel::debugfs::Writer;
use kernel::fmt;
use kernel::sync::atomic::{Atomic, Relaxed};

/// A number of pages or of events.
pub(crate) struct Counter(Atomic<i64>);

impl Counter {
    const fn new() -> Self {
        Self(Atomic::new(0))
    }

    pub(crate) fn add_one(&self) {
        self.0.add(1, Relaxed);
    }

    pub(crate) fn subtract_one(&self) {
        self.0.add(-1, Relaxed);
    }

    fn value(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

/// Pages that show a target's memory now.
pub(crate) static MAPPED: Counter = Counter::new();

/// Pages whose undo the host refused. Those of processes that are gone stay counted: they are never used again.
pub(crate) static QUARANTINED: Counter = Counter::new();

/// Requests that the host refused, to map or to undo, since the module was loaded.
pub(crate) static REFUSED: Counter = Counter::new();

/// Pages mapped since the module was loaded.
pub(crate) static TOTAL: Counter = Counter::new();

/// The counters as text, one `name value` a line.
pub(crate) struct Report;

impl Writer for Report {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "mapped {}", MAPPED.value())?;
        writeln!(f, "quarantined {}", QUARANTINED.value())?;
        writeln!(f, "refused {}", REFUSED.value())?;
        writeln!(f, "total {}", TOTAL.value())
    }
}

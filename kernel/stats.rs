// SPDX-License-Identifier: GPL-2.0-only
//! Counters of the whole module, shown in debugfs as `kvmmem/counters`.

use kernel::debugfs::Writer;
use kernel::fmt;
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};

use crate::abi::descriptor::{COMPLAINT_NOT_CACHED, COMPLAINT_NO_ADDRESS};
use crate::sys::area::{FaultError, FaultResult};

/// A number of pages or of events.
pub(crate) struct Counter(Atomic<i64>);

impl Counter {
    pub(crate) const fn new() -> Self {
        Self(Atomic::new(0))
    }

    pub(crate) fn add_one(&self) {
        self.0.add(1, Relaxed);
    }

    pub(crate) fn add(&self, count: usize) {
        self.0.add(count as i64, Relaxed);
    }

    pub(crate) fn subtract_one(&self) {
        self.0.add(-1, Relaxed);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.load(Relaxed).unsigned_abs()
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident, $text:literal;)*) => {
        $($(#[$doc])* pub(crate) static $name: Counter = Counter::new();)*

        /// Each counter and its name in debugfs.
        static COUNTERS: &[(&str, &Counter)] = &[$(($text, &$name)),*];
    };
}

counters! {
    /// Pages that show a target's memory now.
    MAPPED, "mapped";
    /// Pages whose undo the host refused. Those of processes that are gone stay counted: they are
    /// never used again.
    QUARANTINED, "quarantined";
    /// Requests that the host refused, to map or to undo, since the module was loaded.
    REFUSED, "refused";
    /// Pages mapped since the module was loaded.
    TOTAL, "total";
    /// Views that are open.
    VIEWS, "views";
    /// Views that the host refused to close.
    VIEWS_QUARANTINED, "views-quarantined";
    /// Changes of views that the host made since the module was loaded.
    EVENTS, "events";
    /// Answers of the host that cannot be, since the module was loaded.
    INVALID_ANSWERS, "invalid_answers";
    /// Complaints about slots, since the module was loaded.
    COMPLAINTS, "complaints";
}

/// Whether this machine has memory of a target, in a page or in a view.
pub(crate) fn is_used() -> bool {
    [&MAPPED, &QUARANTINED, &VIEWS, &VIEWS_QUARANTINED]
        .iter()
        .any(|count| count.value() > 0)
}

/// Faults of all views since the module was loaded.
static FAULTS: Faults = Faults::new();

/// Faults by the size of the page.
pub(crate) struct Faults {
    pub(crate) small: Counter,
    pub(crate) huge_2m: Counter,
    pub(crate) huge_1g: Counter,
    /// Those that raised SIGBUS.
    pub(crate) refused: Counter,
}

impl Faults {
    pub(crate) const fn new() -> Self {
        Self {
            small: Counter::new(),
            huge_2m: Counter::new(),
            huge_1g: Counter::new(),
            refused: Counter::new(),
        }
    }

    /// Counts a fault of a view, here and for the whole module. One that is tried again is not
    /// counted.
    pub(crate) fn count(&self, order: u32, result: &Result<FaultResult, FaultError>) {
        for faults in [self, &FAULTS] {
            match (result, order) {
                (Ok(_), 0) => faults.small.add_one(),
                (Ok(_), 9) => faults.huge_2m.add_one(),
                (Ok(_), _) => faults.huge_1g.add_one(),
                (Err(FaultError::Bus), _) => faults.refused.add_one(),
                (Err(FaultError::Smaller | FaultError::Memory), _) => {}
            }
        }
    }
}

/// Counts a slot that cannot be shown and was reported to the host, and logs it, with the same rate
/// limit as invalid answers.
pub(crate) fn complain(why: u32) {
    COMPLAINTS.add_one();
    let count = COMPLAINTS.value();
    if count.is_power_of_two() {
        let why = match why {
            COMPLAINT_NO_ADDRESS => "there is no room for a window's BAR 2 behind its bridge",
            COMPLAINT_NOT_CACHED => "a window's BAR 2 cannot be cached",
            _ => "the descriptor is not possible, or not with these windows",
        };
        pr_warn!("a view cannot be shown: {why} ({count} such slots)\n");
    }
}

/// Counts an answer of the host that cannot be, and logs it: the first one, the second, the fourth,
/// and so on, so that a host cannot fill the log.
pub(crate) fn lie(what: &str) {
    INVALID_ANSWERS.add_one();
    let count = INVALID_ANSWERS.value();
    if count.is_power_of_two() {
        pr_warn!("the host is not believed: {what} ({count} such answers)\n");
    }
}

/// `ENOMEM` for itself, which the host has nothing to do with; for any other error counts a
/// [`lie`]: `EIO`.
pub(crate) fn lie_unless_memory(error: Error, what: &str) -> Error {
    if error == ENOMEM {
        return ENOMEM;
    }
    lie(what);
    EIO
}

/// The counters as text, one `name value` a line.
pub(crate) struct Report;

impl Writer for Report {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, counter) in COUNTERS {
            writeln!(f, "{name} {}", counter.value())?;
        }
        writeln!(f, "faults-4k {}", FAULTS.small.value())?;
        writeln!(f, "faults-2m {}", FAULTS.huge_2m.value())?;
        writeln!(f, "faults-1g {}", FAULTS.huge_1g.value())?;
        writeln!(f, "faults-refused {}", FAULTS.refused.value())
    }
}

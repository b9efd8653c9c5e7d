// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A command that lists the processes of the guest, and how long it took.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::tool::Tool;

/// What the last line of drgn's script begins with.
const NANOSECONDS: &str = "nanoseconds: ";

/// Which command it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    Core,
    Running,
    Embedded,
    DrgnCore,
    DrgnQmp,
    DrgnProcess,
    Volatility,
}

impl Who {
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Core | Self::Running | Self::Embedded)
    }

    /// The process id in a line of its output.
    fn pid(self, line: &str) -> Option<u32> {
        let mut words = line.split_ascii_whitespace();
        match self {
            // An address comes first. Any other line is part of a name.
            Self::Volatility => words
                .next()
                .filter(|word| word.starts_with("0x"))
                .and_then(|_| words.next()?.parse().ok()),
            _ => words.next()?.parse().ok(),
        }
    }
}

pub(super) struct Lister<'a> {
    pub(super) who: Who,
    make: Box<dyn Fn() -> Tool + 'a>,
    /// Nanoseconds of each run.
    pub(super) times: Vec<u64>,
    /// Milliseconds of the list itself, where the command measures them.
    pub(super) alone: Vec<u64>,
}

/// One run.
pub(super) struct Run {
    pub(super) took: u64,
    alone: Option<u64>,
    pub(super) pids: BTreeSet<u32>,
}

impl<'a> Lister<'a> {
    pub(super) fn new(who: Who, make: impl Fn() -> Tool + 'a) -> Self {
        Self { who, make: Box::new(make), times: Vec::new(), alone: Vec::new() }
    }

    /// The guest whose processes it lists, and its program.
    pub(super) fn what(&self) -> &'static str {
        match self.who {
            Who::Core => "a dump",
            Who::Running => "a running guest",
            Who::Embedded => "a running guest without a broker",
            Who::DrgnCore => "drgn on a dump",
            Who::DrgnQmp => "drgn over QMP",
            Who::DrgnProcess => "drgn reading QEMU's memory",
            Who::Volatility => "volatility3 on a dump",
        }
    }

    /// Runs it, and keeps the time.
    pub(super) fn run(&mut self) -> Result<()> {
        let run = self.time()?;
        self.times.push(run.took);
        self.alone.extend(run.alone);
        Ok(())
    }

    /// Runs it, from its start to its end.
    pub(super) fn time(&self) -> Result<Run> {
        let tool = (self.make)();
        let began = Instant::now();
        let text = tool.output()?;
        let took = nanoseconds(began);
        let pids = text.lines().filter_map(|line| self.who.pid(line)).collect();
        let alone = text.lines().find_map(|line| line.strip_prefix(NANOSECONDS)).map(str::parse);
        Ok(Run { took, alone: alone.transpose().context("drgn's script tells no time")?, pids })
    }
}

/// Since `began`.
pub(super) fn nanoseconds(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_in_each_form() {
        let text = "PID  PPID\n1 0 x\nnanoseconds: 5\n";
        let pids = |who: Who, text: &str| {
            text.lines().filter_map(|line| who.pid(line)).collect::<Vec<_>>()
        };
        assert_eq!(pids(Who::Core, text), [1]);
        assert_eq!(pids(Who::Volatility, "OFFSET\tPID\n0xffff\t7\t7\n) R 1\n\n0x1\t9"), [7, 9]);
    }
}

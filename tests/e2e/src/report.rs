// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a scenario checked: one printed line a check, and the count of them.

use std::fmt::Display;
use std::io::{IsTerminal, stdout};
use std::time::{Duration, Instant};

use serde::Serialize;

/// How the lines are printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// For a person.
    Text,
    /// One JSON object a line.
    Json,
}

/// One check.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    /// The scenario it belongs to.
    pub(crate) scenario: String,
    /// What was claimed.
    pub(crate) what: String,
    /// Whether it was so.
    pub(crate) ok: bool,
    /// What was seen, if there is more than `ok`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) detail: String,
    /// Time since the check before it.
    pub(crate) micros: u64,
}

/// Collects and prints the checks of a run.
pub(crate) struct Report {
    style: Style,
    colour: bool,
    scenario: String,
    last: Instant,
    checks: Vec<Check>,
}

impl Report {
    pub(crate) fn new(style: Style) -> Self {
        Self {
            style,
            colour: stdout().is_terminal(),
            scenario: String::new(),
            last: Instant::now(),
            checks: Vec::new(),
        }
    }

    /// Starts a scenario: the checks that follow are its.
    pub(crate) fn begin(&mut self, scenario: &str, purpose: &str) {
        scenario.clone_into(&mut self.scenario);
        self.last = Instant::now();
        self.say(&format!("\n{scenario}: {purpose}"));
    }

    /// Prints a line that is not a check.
    pub(crate) fn say(&self, line: &str) {
        if self.style == Style::Text {
            println!("{line}");
        }
    }

    /// Records a check that took the time since the one before.
    pub(crate) fn check(
        &mut self,
        what: impl Into<String>,
        ok: bool,
        detail: impl Display,
    ) -> bool {
        let took = self.last.elapsed();
        self.timed(what, ok, detail, took)
    }

    /// Records that `seen` equals `wanted`.
    pub(crate) fn equal<T: PartialEq + std::fmt::Debug>(
        &mut self,
        what: impl Into<String>,
        seen: &T,
        wanted: &T,
    ) -> bool {
        let detail =
            if seen == wanted { String::new() } else { format!("got {seen:?}, wanted {wanted:?}") };
        self.check(what, seen == wanted, detail)
    }

    /// Records a check whose time was measured elsewhere.
    pub(crate) fn timed(
        &mut self,
        what: impl Into<String>,
        ok: bool,
        detail: impl Display,
        took: Duration,
    ) -> bool {
        let check = Check {
            scenario: self.scenario.clone(),
            what: what.into(),
            ok,
            detail: detail.to_string(),
            micros: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        };
        match self.style {
            Style::Text => self.print(&check, took),
            Style::Json => println!("{}", serde_json::to_string(&check).unwrap_or_default()),
        }
        self.checks.push(check);
        self.last = Instant::now();
        ok
    }

    fn print(&self, check: &Check, took: Duration) {
        let (colour, word) = if check.ok { ("\x1b[32m", "ok  ") } else { ("\x1b[31m", "FAIL") };
        let (on, off) = if self.colour { (colour, "\x1b[0m") } else { ("", "") };
        let detail =
            if check.detail.is_empty() { String::new() } else { format!(" ({})", check.detail) };
        println!(
            "  {on}{word}{off} {:<72} {:>9.1} ms{detail}",
            check.what,
            took.as_secs_f64() * 1e3
        );
    }

    /// All checks so far.
    pub(crate) fn checks(&self) -> &[Check] {
        &self.checks
    }

    /// How many checks passed.
    pub(crate) fn passed(&self) -> usize {
        self.checks.iter().filter(|check| check.ok).count()
    }

    /// How many checks failed.
    pub(crate) fn failed(&self) -> usize {
        self.checks.len() - self.passed()
    }
}

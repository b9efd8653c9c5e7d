// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Suite of tests: counts of what passed, failed and was skipped, and the summary of several
//! suites.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, anyhow};
use clap::ValueEnum;

use crate::{libtest, ui};

/// The suites, in the order in which they run: from the quickest to the slowest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Name {
    /// Formatting, lints, rules, licences
    Style,
    /// Unit and property tests
    Unit,
    /// Every order of what happens to the broker's core
    Model,
    /// Every interleaving of the races
    Loom,
    /// The Debian packages
    Packages,
    /// The module in a stock kernel
    Module,
    /// The module in a debug kernel, with allocations that fail and a random storm
    DebugKernel,
    /// Other projects' tools, with a guest's core
    Tools,
    /// The command's answers about Linux guests, against their own
    Linux,
    /// The end-to-end scenarios under kvmmem vm
    E2e,
    /// The end-to-end scenarios under stock QEMUs
    Qemu,
}

impl std::fmt::Display for Name {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = self.to_possible_value();
        out.pad(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// A suite that runs.
#[derive(Debug)]
pub(crate) struct Suite {
    name: String,
    begin: Instant,
    count: Count,
    failures: Vec<String>,
}

/// Number of checks by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl std::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl std::fmt::Display for Count {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl Suite {
    /// A suite that begins now.
    pub(crate) fn new(name: impl ToString) -> Self {
        let name = name.to_string();
        ui::say(&format!("\n{name}"));
        Self { name, begin: Instant::now(), count: Count::default(), failures: Vec::new() }
    }

    /// Counts one check.
    pub(crate) fn check(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => self.count.passed += 1,
            Err(error) => self.fail(name, &error),
        }
    }

    /// Counts a failure and prints its reason.
    pub(crate) fn fail(&mut self, name: &str, error: &anyhow::Error) {
        ui::say(&format!("  failed: {name}: {error:#}"));
        self.count.failed += 1;
        self.failures.push(name.to_owned());
    }

    /// Counts something skipped and prints the reason.
    pub(crate) fn skip(&mut self, why: &str) {
        ui::say(&format!("  skipped: {why}"));
        self.count.skipped += 1;
    }

    /// Counts tests that counted themselves; `failures` names those that failed.
    pub(crate) fn add(&mut self, count: Count, failures: Vec<String>) {
        self.count += count;
        self.failures.extend(failures);
    }

    /// Counts the tests that a run of `cargo test` printed to `log`.
    pub(crate) fn cargo_test(&mut self, log: &Path, result: Result<()>) -> Result<()> {
        let text = fs::read(log).with_context(|| log.display().to_string())?;
        let outcome = libtest::read(&String::from_utf8_lossy(&text));
        for reason in &outcome.reasons {
            ui::say(&format!("  skipped: {reason}"));
        }
        self.add(outcome.count, outcome.failures);
        if result.is_err() {
            // The next round overwrites the log.
            let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let kept =
                log.with_extension(format!("failed-{}.log", time.unwrap_or_default().as_secs()));
            fs::copy(log, &kept).with_context(|| kept.display().to_string())?;
            ui::say(&format!("  kept: {}", kept.display()));
        }
        match result {
            // Cargo fails without a failed test if a test does not compile.
            Err(error) if outcome.count.failed == 0 => self.fail("cargo test", &error),
            Err(error) => ui::say(&format!("  {error:#}")),
            Ok(()) if outcome.count == Count::default() => {
                self.fail("cargo test", &anyhow!("no test ran"));
            }
            Ok(()) => {}
        }
        Ok(())
    }

    /// Its part of the summary.
    pub(crate) fn finish(self) -> SuiteResult {
        SuiteResult {
            name: self.name,
            rounds: 1,
            took: self.begin.elapsed(),
            count: self.count,
            failures: self.failures.into_iter().map(|name| (name, vec![1])).collect(),
        }
    }
}

/// A suite that has ended, once or several times.
#[derive(Debug)]
pub(crate) struct SuiteResult {
    name: String,
    rounds: u32,
    took: Duration,
    count: Count,
    /// Checks that failed, each with the rounds in which it did.
    failures: Vec<(String, Vec<u32>)>,
}

/// Adds what came of one round of a suite to what came of the earlier ones.
pub(crate) fn merge(all: &mut Vec<SuiteResult>, round: u32, one: SuiteResult) {
    let Some(suite) = all.iter_mut().find(|suite| suite.name == one.name) else {
        let failures = one.failures.into_iter().map(|(name, _)| (name, vec![round])).collect();
        all.push(SuiteResult { failures, ..one });
        return;
    };
    suite.rounds += 1;
    suite.took += one.took;
    suite.count += one.count;
    for (name, _) in one.failures {
        match suite.failures.iter_mut().find(|(known, _)| *known == name) {
            Some((_, rounds)) => rounds.push(round),
            None => suite.failures.push((name, vec![round])),
        }
    }
}

/// Prints the summary; returns whether nothing failed.
pub(crate) fn summary(suites: &[SuiteResult]) -> bool {
    print!("\n{}", lines(suites));
    suites.iter().all(|suite| suite.count.failed == 0)
}

fn lines(suites: &[SuiteResult]) -> String {
    let mut text = String::new();
    let mut all = Count::default();
    for suite in suites {
        let rounds =
            if suite.rounds > 1 { format!(", {} rounds", suite.rounds) } else { String::new() };
        text += &format!(
            "{:<12} {} in {:.0} s{rounds}\n",
            suite.name,
            suite.count,
            suite.took.as_secs_f64()
        );
        all += suite.count;
    }
    for suite in suites {
        for (name, rounds) in &suite.failures {
            let rounds: Vec<_> = rounds.iter().map(u32::to_string).collect();
            text += &format!("failed: {}: {name} (round {})\n", suite.name, rounds.join(", "));
        }
    }
    text + &format!("{all}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(name: Name, failures: &[&str]) -> SuiteResult {
        let failed = u64::try_from(failures.len()).unwrap();
        SuiteResult {
            name: name.to_string(),
            rounds: 1,
            took: Duration::from_secs(2),
            count: Count { passed: 5, failed, skipped: 1 },
            failures: failures.iter().map(|name| ((*name).to_owned(), vec![1])).collect(),
        }
    }

    #[test]
    fn the_summary_names_each_failed_check_with_its_rounds() {
        let mut all = Vec::new();
        merge(&mut all, 1, round(Name::Unit, &["a"]));
        merge(&mut all, 1, round(Name::E2e, &[]));
        merge(&mut all, 2, round(Name::Unit, &["b"]));
        merge(&mut all, 3, round(Name::Unit, &["a"]));
        assert_eq!(
            lines(&all),
            "unit         15 passed, 3 failed, 3 skipped in 6 s, 3 rounds\n\
             e2e          5 passed, 0 failed, 1 skipped in 2 s\n\
             failed: unit: a (round 1, 3)\n\
             failed: unit: b (round 2)\n\
             20 passed, 3 failed, 4 skipped\n"
        );
    }
}

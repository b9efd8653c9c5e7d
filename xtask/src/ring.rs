// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Counting: what passed, failed and was skipped in one ring of the tests.

use std::time::{Duration, Instant};

use crate::ui;

/// One ring.
#[derive(Debug)]
pub(crate) struct Ring {
    name: &'static str,
    begin: Instant,
    count: Count,
}

/// What came of its tests.
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

impl Ring {
    pub(crate) fn new(name: &'static str) -> Self {
        ui::say(&format!("\n{name}"));
        Self { name, begin: Instant::now(), count: Count::default() }
    }

    /// Counts one check.
    pub(crate) fn check(&mut self, result: anyhow::Result<()>) {
        match result {
            Ok(()) => self.count.passed += 1,
            Err(error) => self.fail(&error),
        }
    }

    /// Counts tests that counted themselves.
    pub(crate) fn add(&mut self, count: Count) {
        self.count += count;
    }

    /// Counts a failure and says why.
    pub(crate) fn fail(&mut self, error: &anyhow::Error) {
        ui::say(&format!("  failed: {error:#}"));
        self.count.failed += 1;
    }

    /// Counts something skipped and says why.
    pub(crate) fn skip(&mut self, why: &str) {
        ui::say(&format!("  skipped: {why}"));
        self.count.skipped += 1;
    }

    /// Its line in the summary.
    pub(crate) fn finish(self) -> Finished {
        Finished { name: self.name, took: self.begin.elapsed(), count: self.count }
    }
}

/// A ring that has ended.
#[derive(Debug)]
pub(crate) struct Finished {
    name: &'static str,
    took: Duration,
    count: Count,
}

/// Prints the summary; returns whether nothing failed.
pub(crate) fn summary(rings: &[Finished]) -> bool {
    println!();
    let mut all = Count::default();
    for ring in rings {
        println!("{:<12} {} in {:.0} s", ring.name, ring.count, ring.took.as_secs_f64());
        all += ring.count;
    }
    println!("{all}");
    all.failed == 0
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A line of the table: times, what they are compared with, and the goal.

use anyhow::{Context as _, Result};
use serde::Serialize;

/// Which side of the goal is the good one.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Better {
    Lower,
    Higher,
}

/// One line.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    name: String,
    ratio: f64,
    goal: f64,
    better: Better,
    p50_ns: u64,
    p99_ns: u64,
    floor_p50_ns: u64,
    floor_p99_ns: u64,
}

impl Row {
    /// Times that must not exceed a limit.
    pub(super) fn within(name: String, limit_ns: u64, times: &[u64]) -> Result<Self> {
        Self::new(name, 1.0, Better::Lower, times, &[limit_ns])
    }

    /// How many times as fast as `peer` it is.
    pub(super) fn faster(name: String, goal: f64, times: &[u64], peer: &[u64]) -> Result<Self> {
        Self::new(name, goal, Better::Higher, times, peer)
    }

    fn new(name: String, goal: f64, better: Better, times: &[u64], floor: &[u64]) -> Result<Self> {
        let (p50_ns, p99_ns) = (percentile(times, 50)?, percentile(times, 99)?);
        let (floor_p50_ns, floor_p99_ns) = (percentile(floor, 50)?, percentile(floor, 99)?);
        let (ours, theirs) = (p50_ns as f64, floor_p50_ns as f64);
        let ratio = if matches!(better, Better::Higher) { theirs / ours } else { ours / theirs };
        Ok(Self { name, ratio, goal, better, p50_ns, p99_ns, floor_p50_ns, floor_p99_ns })
    }
}

/// Prints the table, or one JSON object a line.
pub(super) fn print(rows: &[Row], is_json: bool) -> Result<()> {
    if is_json {
        for row in rows {
            println!("{}", serde_json::to_string(row)?);
        }
        return Ok(());
    }
    println!(
        "{:<62} {:>8} {:>7} {:>9} {:>9} {:>10} {:>10}",
        "", "ratio", "goal", "p50 ms", "p99 ms", "peer p50", "peer p99"
    );
    for row in rows {
        let millis = |nanos: u64| nanos as f64 / 1e6;
        let sign = match row.better {
            Better::Lower => "<=",
            Better::Higher => ">=",
        };
        println!(
            "{:<62} {:>8.2} {:>7} {:>9.1} {:>9.1} {:>10.1} {:>10.1}",
            row.name,
            row.ratio,
            format!("{sign}{}", row.goal),
            millis(row.p50_ns),
            millis(row.p99_ns),
            millis(row.floor_p50_ns),
            millis(row.floor_p99_ns)
        );
    }
    Ok(())
}

/// The time that `percent` percent of `times` do not exceed.
fn percentile(times: &[u64], percent: usize) -> Result<u64> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().context("nothing was measured")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_say_how_far_a_goal_is_met() {
        let row = Row::within("a".into(), 100, &[50, 200, 60]).unwrap();
        assert_eq!((row.p50_ns, row.p99_ns), (60, 200));
        assert!((row.ratio - 0.6).abs() < 1e-9);
        let row = Row::faster("b".into(), 3.0, &[10], &[50]).unwrap();
        assert!((row.ratio - 5.0).abs() < 1e-9);
        assert!(Row::within("c".into(), 1, &[]).is_err());
    }
}

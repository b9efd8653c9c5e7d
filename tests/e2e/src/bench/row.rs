// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A line of the table: times, what they are compared with, and the goal.

use anyhow::{Context, Result};
use kvmmem_probe::Samples;
use serde::Serialize;

/// Which side of the goal is the good one.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Better {
    Lower,
    Higher,
}

/// One line.
#[derive(Serialize)]
pub(super) struct Row {
    name: &'static str,
    ratio: f64,
    goal: f64,
    better: Better,
    p50_ns: u64,
    p99_ns: u64,
    floor_p50_ns: u64,
    floor_p99_ns: u64,
}

impl Row {
    /// How many times as long as `floor` the `times` take, each divided by `per`.
    pub(super) fn slower(
        name: &'static str,
        goal: f64,
        times: &[u64],
        per: u64,
        floor: &[u64],
    ) -> Result<Self> {
        let (p50_ns, p99_ns) = (percentile(times, 50)? / per, percentile(times, 99)? / per);
        let (floor_p50_ns, floor_p99_ns) = (percentile(floor, 50)?, percentile(floor, 99)?);
        let ratio = precise(p50_ns)? / precise(floor_p50_ns)?;
        Ok(Self {
            name,
            ratio,
            goal,
            better: Better::Lower,
            p50_ns,
            p99_ns,
            floor_p50_ns,
            floor_p99_ns,
        })
    }

    /// How many times as fast as `peer` it is.
    pub(super) fn faster(
        name: &'static str,
        goal: f64,
        times: &[u64],
        peer: &[u64],
    ) -> Result<Self> {
        let row = Self::slower(name, goal, times, 1, peer)?;
        let ratio = precise(row.floor_p50_ns)? / precise(row.p50_ns)?;
        Ok(Self { ratio, better: Better::Higher, ..row })
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
        "{:<58} {:>8} {:>8} {:>10} {:>10} {:>12} {:>12}",
        "", "ratio", "goal", "p50 us", "p99 us", "floor p50", "floor p99"
    );
    for row in rows {
        let micros = |nanos| precise(nanos).map(|nanos| nanos / 1e3);
        let sign = match row.better {
            Better::Lower => "<=",
            Better::Higher => ">=",
        };
        println!(
            "{:<58} {:>8.3} {:>8} {:>10.2} {:>10.2} {:>12.2} {:>12.2}",
            row.name,
            row.ratio,
            format!("{sign}{}", row.goal),
            micros(row.p50_ns)?,
            micros(row.p99_ns)?,
            micros(row.floor_p50_ns)?,
            micros(row.floor_p99_ns)?
        );
    }
    Ok(())
}

/// The series of this name.
pub(super) fn find<'a>(series: &'a [Samples], name: &str) -> Result<&'a [u64]> {
    let found = series.iter().find(|samples| samples.name == name);
    found
        .map(|samples| samples.nanos.as_slice())
        .with_context(|| format!("no measurement is named {name:?}"))
}

/// The time that `percent` percent of `times` do not exceed.
fn percentile(times: &[u64], percent: usize) -> Result<u64> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().context("nothing was measured")
}

/// Nanoseconds as a number to divide: exact below 2^32 microseconds, over an hour.
fn precise(nanos: u64) -> Result<f64> {
    let whole = f64::from(u32::try_from(nanos / 1000).context("over an hour")?);
    Ok(whole * 1e3 + f64::from(u32::try_from(nanos % 1000)?))
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench v1`: ratios of the v1 paths to their floors, all taken in one run on one host.

mod floor;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use kvmmem_guest::Command;
use kvmmem_probe::Samples;
use serde::Serialize;

use crate::bed::Bed;
use crate::scenarios::mapping::next_line;
use crate::world::{PROBE, World};

/// Rounds of each series.
const ROUNDS: usize = 500;
/// Mappings of the file that is closed.
const MAPPINGS: usize = 4096;
/// How long the guest's part may take.
const LIMIT: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// The seed's interface.
    V1,
}

#[derive(Args)]
pub(crate) struct Arguments {
    /// What to measure.
    what: What,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

/// One line of the table.
#[derive(Serialize)]
struct Row {
    name: &'static str,
    ratio: f64,
    goal: f64,
    better: &'static str,
    p50_ns: u64,
    p99_ns: u64,
    floor_p50_ns: u64,
    floor_p99_ns: u64,
}

impl Row {
    /// `times` is divided by `per` to compare with `floor`.
    fn new(name: &'static str, goal: f64, times: &[u64], per: u64, floor: &[u64]) -> Result<Self> {
        let (p50_ns, p99_ns) = (percentile(times, 50)? / per, percentile(times, 99)? / per);
        let (floor_p50_ns, floor_p99_ns) = (percentile(floor, 50)?, percentile(floor, 99)?);
        let ratio = precise(p50_ns)? / precise(floor_p50_ns)?;
        Ok(Self { name, ratio, goal, better: "lower", p50_ns, p99_ns, floor_p50_ns, floor_p99_ns })
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let What::V1 = arguments.what;
    let mut world = World::start(Bed::from_env()?)?;
    let series = guest_series(&mut world)?;
    let find = |name: &str| {
        series
            .iter()
            .find(|samples| samples.name == name)
            .map(|samples| samples.nanos.as_slice())
            .context("no series")
    };
    let rows = [
        Row::new(
            "map + first touch + unmap, against its floor",
            1.3,
            find("map, touch, unmap")?,
            1,
            &floor::cycles(ROUNDS)?,
        )?,
        // One close is one time: it stands against the UNMAPs' sum, which is as long and meets as many timer ticks.
        Row::new(
            "close of 4,096 mappings, per page, against one UNMAP",
            1.0,
            find("close, all mappings")?,
            MAPPINGS as u64,
            &[find("one UNMAP")?.iter().sum::<u64>() / MAPPINGS as u64],
        )?,
    ];
    if arguments.json {
        for row in &rows {
            println!("{}", serde_json::to_string(row)?);
        }
        return Ok(0);
    }
    println!(
        "{:<54} {:>6} {:>6} {:>10} {:>10} {:>12} {:>12}",
        "", "ratio", "goal", "p50 us", "p99 us", "floor p50", "floor p99"
    );
    for row in &rows {
        let micros = |nanos| precise(nanos).map(|nanos| nanos / 1e3);
        println!(
            "{:<54} {:>6.2} {:>6} {:>10.2} {:>10.2} {:>12.2} {:>12.2}",
            row.name,
            row.ratio,
            format!("<={}", row.goal),
            micros(row.p50_ns)?,
            micros(row.p99_ns)?,
            micros(row.floor_p50_ns)?,
            micros(row.floor_p99_ns)?
        );
    }
    Ok(0)
}

/// What the probe in the introspector times.
fn guest_series(world: &mut World) -> Result<Vec<Samples>> {
    let port = world.hook_port()?;
    // The marker's page stays what it is, a page of RAM; its program would only take time from what is measured.
    let marker = world.marker()?;
    marker.child.kill(9)?;
    marker.child.wait(LIMIT)?;
    let command = Command::new(PROBE).as_member().memlock(64 << 20).args([
        "timing",
        "--port",
        &port.to_string(),
        "--gpa",
        &world.gpa()?.to_string(),
        "--rounds",
        &ROUNDS.to_string(),
        "--mappings",
        &MAPPINGS.to_string(),
    ]);
    let mut child = world.agent()?.spawn(&command)?;
    let mut series = Vec::new();
    while let Some(line) = next_line(world, &mut child)? {
        series.push(serde_json::from_str(&line).with_context(|| format!("the probe says {line:?}"))?);
    }
    ensure!(child.wait(LIMIT)?.success(), "the probe failed: {}", child.take_stderr());
    Ok(series)
}

/// The time that `percent` percent of `times` do not exceed.
fn percentile(times: &[u64], percent: usize) -> Result<u64> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().context("nothing was measured")
}

/// Nanoseconds as a number to divide: exact below 2^32, four seconds.
fn precise(nanos: u64) -> Result<f64> {
    Ok(f64::from(u32::try_from(nanos).context("over four seconds")?))
}

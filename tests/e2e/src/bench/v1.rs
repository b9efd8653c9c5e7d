// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench v1`: single pages.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvmmem_guest::Command;
use kvmmem_probe::Samples;

use super::floor;
use super::row::{Row, find};
use crate::scenarios::mapping::next_line;
use crate::test_bed::TestBed;
use crate::world::{PROBE, World};

/// Rounds of each series.
const ROUNDS: usize = 500;
/// Mappings of the file that is closed.
const MAPPINGS: usize = 4096;
/// How long the guest's part may take.
const LIMIT: Duration = Duration::from_secs(600);

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut world = World::start(TestBed::from_env()?)?;
    let series = guest_series(&mut world)?;
    Ok(vec![
        Row::slower(
            "map + first touch + unmap, against its floor",
            1.3,
            find(&series, "map, touch, unmap")?,
            1,
            &floor::cycles(ROUNDS)?,
        )?,
        // One close is one time: it stands against the UNMAPs' sum, which is as long and meets as
        // many timer ticks.
        Row::slower(
            "close of 4,096 mappings, per page, against one UNMAP",
            1.0,
            find(&series, "close, all mappings")?,
            MAPPINGS as u64,
            &[find(&series, "one UNMAP")?.iter().sum::<u64>() / MAPPINGS as u64],
        )?,
    ])
}

/// What the probe in the introspector times.
fn guest_series(world: &mut World) -> Result<Vec<Samples>> {
    let port = world.hook_port()?;
    // The marker's page stays what it is, a page of RAM; its program would only take time from what
    // is measured.
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
        series
            .push(serde_json::from_str(&line).with_context(|| format!("the probe says {line:?}"))?);
    }
    ensure!(child.wait(LIMIT)?.success(), "the probe failed: {}", child.take_stderr());
    Ok(series)
}

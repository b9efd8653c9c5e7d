// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The demo's second act: a tool with the client library, and the owner of the grant.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use kvmmem_guest::{Child, Command};
use kvmmem_probe::{Ready, Step};

use crate::report::Report;
use crate::wait::PATIENCE;
use crate::world::{PROBE, World};

pub(crate) fn act(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let marker = world.marker()?.hex.clone();
    let grant = world.grant_as(|request| request)?;
    report.check(
        "the owner grants a read-only look, for one use",
        true,
        format!("grant {}", grant.grant),
    );
    let token = grant.token.to_hex();
    let command = Command::new(PROBE).as_member().env("KVMMEM_TOKEN", token.as_str()).args([
        "spy",
        "--gpa",
        &gpa.to_string(),
        "--marker",
        &marker,
    ]);
    let child = world.agent()?.spawn(&command)?;
    follow(report, child, |report| {
        let revoked = world.revoke(grant.grant)?;
        report.check(
            "revoke: the host has taken the memory away",
            (revoked.views, revoked.unconfirmed) == (1, 0),
            format!("within {} us of the broker's time", revoked.micros),
        );
        Ok(())
    })
}

/// Reports the steps of a tool until its end; `act` is done when it says that it is ready.
pub(crate) fn follow(
    report: &mut Report,
    mut child: Child,
    mut act: impl FnMut(&mut Report) -> Result<()>,
) -> Result<()> {
    while let Some(line) = child.read_line(PATIENCE)? {
        if serde_json::from_str::<Ready>(&line).is_ok() {
            act(report)?;
            continue;
        }
        let step: Step =
            serde_json::from_str(&line).with_context(|| format!("the probe says {line:?}"))?;
        report.timed(step.what, step.ok, step.detail, Duration::from_nanos(step.nanos));
    }
    let status = child.wait(PATIENCE)?;
    if !status.success() {
        bail!("the probe failed, {status}: {}", child.take_stderr());
    }
    Ok(())
}

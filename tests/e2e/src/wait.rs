// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Waits for conditions, never for times, so that a slow machine makes no difference.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

/// How long anything that must come may take, in an emulated host on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// How often a condition is looked at.
const INTERVAL: Duration = Duration::from_millis(50);

/// Whether `condition` comes to hold.
pub(crate) fn until(mut condition: impl FnMut() -> Result<bool>) -> Result<bool> {
    let end = Instant::now() + PATIENCE;
    loop {
        if condition()? {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        thread::sleep(INTERVAL);
    }
}

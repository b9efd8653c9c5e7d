// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Waiting in unit tests.

use std::time::{Duration, Instant};

/// Much longer than anything takes on a machine that is slow and busy.
const LIMIT: Duration = Duration::from_secs(60);

/// Waits until something holds.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "still waiting: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

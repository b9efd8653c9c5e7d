// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits how often an event that a guest or a peer can cause is written down.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The time over which lines are counted.
const WINDOW: Duration = Duration::from_secs(1);

/// Lets so many lines through in each second, and counts the others.
#[derive(Debug)]
pub(crate) struct RateLimit {
    per_second: u32,
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

impl RateLimit {
    /// A limit of so many lines in a second.
    pub(crate) const fn new(per_second: u32) -> Self {
        Self { per_second, state: Mutex::new(None) }
    }

    /// Whether a line may be written at `now`, and how many were not since the last one that was.
    pub(crate) fn allow(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = state.get_or_insert(State { since: now, lines: 0, suppressed: 0 });
        if now.saturating_duration_since(state.since) >= WINDOW {
            state.since = now;
            state.lines = 0;
        }
        if state.lines >= self.per_second {
            state.suppressed += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_limit_are_counted() {
        let (limit, now) = (RateLimit::new(2), Instant::now());
        assert_eq!(limit.allow(now), Some(0));
        assert_eq!(limit.allow(now), Some(0));
        assert_eq!(limit.allow(now), None);
        assert_eq!(limit.allow(now + WINDOW / 2), None);
        assert_eq!(limit.allow(now + WINDOW), Some(2));
        assert_eq!(limit.allow(now + WINDOW), Some(0));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A limit on log lines that a guest can cause: one [`LogLimit`] in a `static` per call site.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines that may be written at once.
const BURST: u32 = 5;

/// Time after which one more line may be written.
const INTERVAL: Duration = Duration::from_secs(1);

/// A token bucket: [`BURST`] lines, then one per [`INTERVAL`].
#[derive(Debug)]
pub(crate) struct LogLimit(Mutex<State>);

#[derive(Debug)]
struct State {
    tokens: u32,
    suppressed: u64,
    refilled: Option<Instant>,
}

impl LogLimit {
    /// A full bucket.
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(State { tokens: BURST, suppressed: 0, refilled: None }))
    }

    /// Whether a line may be written now, and how many were not since the last one.
    pub(crate) fn allow(&self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let since = *state.refilled.get_or_insert(now);
        let intervals = now.saturating_duration_since(since).as_secs() / INTERVAL.as_secs();
        if intervals > 0 {
            let refill = u32::try_from(intervals).unwrap_or(BURST);
            state.tokens = state.tokens.saturating_add(refill).min(BURST);
            state.refilled = Some(now);
        }
        if state.tokens == 0 {
            state.suppressed = state.suppressed.saturating_add(1);
            return None;
        }
        state.tokens -= 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

/// `tracing::warn!` that a guest may trigger: limited per call site, with the number of lines left out.
macro_rules! warn_limited {
    ($($arg:tt)+) => {{
        static LIMIT: $crate::limit::LogLimit = $crate::limit::LogLimit::new();
        if let Some(suppressed) = LIMIT.allow() {
            ::tracing::warn!(suppressed, $($arg)+);
        }
    }};
}
pub(crate) use warn_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_leaves_the_burst_and_one_line_a_second() {
        let limit = LogLimit::new();
        let start = Instant::now();
        let first = (0..1000).filter(|_| limit.allow_at(start).is_some()).count();
        assert_eq!(first, 5);
        assert_eq!(limit.allow_at(start + Duration::from_millis(1500)), Some(995));
        assert_eq!(limit.allow_at(start + Duration::from_millis(1600)), None);
    }
}

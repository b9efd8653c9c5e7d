// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits how often an event that a guest or a peer can cause is written down.
//!
//! The broker, the VMM and the monitors of QEMU use it at each such line of their logs. What is not
//! written is counted, and the next line says how many there were.
#![deny(unsafe_code)]

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const SECOND_NS: u128 = 1_000_000_000;

/// How many lines are let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// At once, after a pause.
    pub burst: u32,
    /// In each second, in the long run; at least one.
    pub per_second: u32,
}

impl Rate {
    /// So many lines a second.
    pub const fn of(per_second: u32) -> Self {
        Self { burst: per_second, per_second }
    }
}

/// A token bucket that counts what it does not let through.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// When `tokens` were counted.
    at: Instant,
    tokens: u32,
    suppressed: u64,
}

impl Bucket {
    /// A full bucket.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self { at: now, tokens: rate.burst, suppressed: 0 }
    }

    /// Whether a line may be written at `now`, and how many were not since the last one that was.
    pub fn allow(&mut self, rate: Rate, now: Instant) -> Option<u64> {
        self.refill(rate, now);
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                Some(std::mem::take(&mut self.suppressed))
            }
            None => {
                self.suppressed += 1;
                None
            }
        }
    }

    /// Whether the bucket is full again, so that a new one would do as well.
    pub fn is_full(&mut self, rate: Rate, now: Instant) -> bool {
        self.refill(rate, now);
        self.tokens >= rate.burst
    }

    /// How many lines were not let through since the last one that was.
    pub fn suppressed(&self) -> u64 {
        self.suppressed
    }

    /// Counts lines that another bucket did not let through.
    pub fn suppress(&mut self, lines: u64) {
        self.suppressed += lines;
    }

    fn refill(&mut self, rate: Rate, now: Instant) {
        let per_second = u128::from(rate.per_second.max(1));
        let earned = now.saturating_duration_since(self.at).as_nanos() * per_second / SECOND_NS;
        let tokens = u128::from(self.tokens) + earned;
        if tokens >= u128::from(rate.burst) {
            (self.tokens, self.at) = (rate.burst, self.at.max(now));
        } else {
            self.tokens = u32::try_from(tokens).unwrap_or(rate.burst);
            // What is left of the last token's time counts for the next one.
            self.at +=
                Duration::from_nanos(u64::try_from(earned * SECOND_NS / per_second).unwrap_or(0));
        }
    }
}

/// Lets so many lines through in each second, and counts the others.
#[derive(Debug)]
pub struct RateLimit {
    rate: Rate,
    bucket: Mutex<Option<Bucket>>,
}

impl RateLimit {
    /// A limit of so many lines in a second.
    pub const fn new(per_second: u32) -> Self {
        Self::at(Rate::of(per_second))
    }

    /// A limit with a burst of its own.
    pub const fn at(rate: Rate) -> Self {
        Self { rate, bucket: Mutex::new(None) }
    }

    /// Whether a line may be written at `now`, and how many were not since the last one that was.
    pub fn allow(&self, now: Instant) -> Option<u64> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.get_or_insert_with(|| Bucket::new(self.rate, now)).allow(self.rate, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn lines_beyond_the_limit_are_counted() {
        let (limit, now) = (RateLimit::new(2), Instant::now());
        assert_eq!(limit.allow(now), Some(0));
        assert_eq!(limit.allow(now), Some(0));
        assert_eq!(limit.allow(now), None);
        assert_eq!(limit.allow(now + SECOND / 4), None);
        assert_eq!(limit.allow(now + SECOND), Some(2));
        assert_eq!(limit.allow(now + SECOND), Some(0));
        assert_eq!(limit.allow(now + SECOND), None);
    }

    #[test]
    fn a_flood_leaves_the_burst_and_one_line_a_second() {
        let (limit, start) = (RateLimit::at(Rate { burst: 5, per_second: 1 }), Instant::now());
        let first = (0..1000).filter(|_| limit.allow(start).is_some()).count();
        assert_eq!(first, 5);
        assert_eq!(limit.allow(start + SECOND * 3 / 2), Some(995));
        assert_eq!(limit.allow(start + SECOND * 8 / 5), None);
    }

    #[test]
    fn a_burst_comes_back_slowly() {
        let (rate, now) = (Rate { burst: 100, per_second: 10 }, Instant::now());
        let mut bucket = Bucket::new(rate, now);
        let mut count = |at| (0..1000).filter(|_| bucket.allow(rate, at).is_some()).count();
        assert_eq!(count(now), 100);
        // Time that is no whole token is not lost.
        let tenths = (1..=10).map(|n| count(now + SECOND / 20 * n)).sum::<usize>();
        assert_eq!(tenths, 5);
        assert_eq!(count(now + SECOND * 1000), 100);
        // A clock of another thread that is behind gives nothing twice.
        assert_eq!(count(now), 0);
        assert!(
            !bucket.is_full(rate, now + SECOND * 1009) && bucket.is_full(rate, now + SECOND * 1010)
        );
    }
}

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A progress bar on standard error, where that is a terminal.

use std::fmt::Write;
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::output::Output;

const TEMPLATE: &str = "{wide_bar} {binary_bytes} of {binary_total_bytes}{left}";

/// How long to measure before the remaining time is shown.
const MEASURED: Duration = Duration::from_secs(2);

/// A bar that counts bytes up to `total`. It is hidden where standard error is not a terminal.
pub(crate) fn bytes(total: u64, output: &Output) -> ProgressBar {
    let target =
        if output.is_json() { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style =
        ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
    let style = style.with_key("left", |state: &ProgressState, to: &mut dyn Write| {
        if let Some(left) = left(state.elapsed(), state.pos(), state.len().unwrap_or(0)) {
            // Text is all that is written, and takes it.
            let _ = write!(to, ", {} left", HumanDuration(left));
        }
    });
    ProgressBar::with_draw_target(Some(total), target).with_style(style)
}

/// How long the rest takes at the rate so far; `None` where that is not known yet.
fn left(elapsed: Duration, done: u64, total: u64) -> Option<Duration> {
    if elapsed < MEASURED || done == 0 {
        return None;
    }
    let millis =
        elapsed.as_millis().checked_mul(total.saturating_sub(done).into())? / u128::from(done);
    Some(Duration::from_millis(u64::try_from(millis).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_told_once_the_rate_is_known() {
        let seconds = Duration::from_secs;
        assert_eq!(left(seconds(1), 1 << 30, 2 << 30), None);
        assert_eq!(left(seconds(3), 0, 2 << 30), None);
        assert_eq!(left(seconds(4), 1 << 30, 3 << 30), Some(seconds(8)));
        assert_eq!(left(seconds(4), 3 << 30, 1 << 30), Some(seconds(0)));
    }
}

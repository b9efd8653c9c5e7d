// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the user sees on stderr: a spinner on a terminal, plain lines elsewhere.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// Runs `work` under the title `what`; prints the title with the time it took.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let spinner = std::io::stderr().is_terminal().then(|| spinner(what));
    if spinner.is_none() {
        eprintln!("  {what} ...");
    }
    let result = work();
    if let Some(spinner) = &spinner {
        spinner.finish_and_clear();
    }
    let mark = if result.is_ok() { "done" } else { "FAILED" };
    eprintln!("  {what}: {mark} in {:.1} s", begin.elapsed().as_secs_f64());
    result
}

/// One plain line.
pub(crate) fn say(line: &str) {
    eprintln!("{line}");
}

fn spinner(what: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("  {spinner} {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.set_message(what.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

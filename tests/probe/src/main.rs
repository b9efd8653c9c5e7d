// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the end-to-end scenarios run inside the guests.
#![deny(unsafe_code)]

mod batch;
mod crowd;
mod hold;
mod marker;
mod pagemap;
mod reads;
mod scattered;
mod spy;
mod timing;
mod tokens;
mod tour;
mod vend;

use anyhow::Result;
use clap::Parser;
use kvmmem_probe::Step;

#[derive(Parser)]
#[command(name = "kvmmem-probe", about)]
enum Verb {
    /// In the target: put a marker and a counter into memory and print their addresses.
    Marker {
        /// How many pages.
        #[arg(long, default_value_t = 1)]
        pages: usize,
    },
    /// In the introspector: token, map, read, watch, write, unmap, once around.
    Tour(tour::Arguments),
    /// In the introspector: send batches as libkvmi does.
    Batch(batch::Arguments),
    /// In the introspector: map many pages at once, check each, undo half by UNMAP and half by
    /// closing the file.
    Crowd(crowd::Arguments),
    /// In the introspector: attach a view, scan, watch, and lose it.
    Spy(spy::Arguments),
    /// In the introspector: attach a view and read one place until that fails.
    Hold(hold::Arguments),
    /// In the introspector: time what a tool gets out of the library.
    Reads(reads::Arguments),
    /// In the introspector: time scattered reads over KVMI and through a view.
    Scattered(scattered::Arguments),
    /// In the introspector: time mapping and unmapping.
    Timing(timing::Arguments),
    /// In the introspector: print tokens.
    Vend(vend::Arguments),
}

fn main() -> Result<()> {
    match Verb::parse() {
        Verb::Marker { pages } => marker::run(pages),
        Verb::Tour(arguments) => tour::run(&arguments),
        Verb::Batch(arguments) => batch::run(&arguments),
        Verb::Crowd(arguments) => crowd::run(&arguments),
        Verb::Spy(arguments) => spy::run(&arguments),
        Verb::Hold(arguments) => hold::run(&arguments),
        Verb::Reads(arguments) => reads::run(&arguments),
        Verb::Scattered(arguments) => scattered::run(&arguments),
        Verb::Timing(arguments) => timing::run(&arguments),
        Verb::Vend(arguments) => vend::run(&arguments),
    }
}

/// Prints one line of the probe's output.
fn say(line: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(line)?);
    Ok(())
}

/// Runs and times one step; its outcome is `Ok((right, seen))`, an error is a step that failed.
fn step(what: &str, act: impl FnOnce() -> Result<(bool, String)>) -> Result<bool> {
    let start = std::time::Instant::now();
    let outcome = act();
    let nanos = u64::try_from(start.elapsed().as_nanos())?;
    let (ok, detail) = outcome.unwrap_or_else(|error| (false, format!("{error:#}")));
    say(&Step { what: what.to_owned(), ok, detail, nanos })?;
    Ok(ok)
}

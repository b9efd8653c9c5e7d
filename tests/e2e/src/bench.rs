//! `cargo xtask bench v1`: ratios of the mapping path to its floors, all taken in one run.

use anyhow::{Result, bail};
use clap::Args;

#[derive(Args)]
pub(crate) struct Arguments {
    /// What to measure: v1.
    what: String,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    bail!("{} {}", arguments.what, arguments.json)
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench`: ratios to a floor or a peer, both taken in one run on one host; and counts.

mod exits;
mod floor;
mod qemu;
mod row;
mod v1;
mod views;
mod without_module;

use anyhow::Result;
use clap::{Args, ValueEnum};

use row::print;

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// v1.
    V1,
    /// Views.
    Views,
    /// Views in introspectors under stock QEMUs.
    Qemu,
    /// VM exits of each operation.
    Exits,
}

#[derive(Args)]
pub(crate) struct Arguments {
    /// What to measure.
    what: What,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let rows = match arguments.what {
        What::V1 => v1::rows()?,
        What::Views => views::rows()?,
        What::Qemu => qemu::rows()?,
        What::Exits => {
            exits::print(&exits::counts()?, arguments.json)?;
            return Ok(0);
        }
    };
    print(&rows, arguments.json)?;
    Ok(0)
}

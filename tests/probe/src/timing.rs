// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Times what a v1 tool does most: map, first touch, unmap; and closing a file full of mappings.

use std::time::Instant;

use anyhow::Result;
use clap::Args;
use kvmmem::Device;
use kvmmem_probe::Samples;

use crate::crowd::Crowd;
use crate::say;
use crate::tokens::Tokens;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The vsock port to listen on for the host.
    #[arg(long)]
    port: u32,
    /// A page of the target.
    #[arg(long)]
    gpa: u64,
    /// How many rounds of map, touch and unmap.
    #[arg(long, default_value_t = 500)]
    rounds: usize,
    /// How many mappings the closed file holds.
    #[arg(long, default_value_t = 4096)]
    mappings: usize,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    // A tool's own tokens where the mapping is timed, quicker ones where it is not.
    let (mut tokens, mut bearer) = (Tokens::open(Some(arguments.port))?, Tokens::open(None)?);
    let device = Device::open_default()?;

    let mut cycle = Vec::with_capacity(arguments.rounds);
    for round in 0..arguments.rounds {
        let token = tokens.next(arguments.rounds - round)?;
        let start = Instant::now();
        let page = device.map(token, arguments.gpa)?;
        page.read_u64(0)?;
        page.unmap()?;
        cycle.push(nanos(start)?);
    }
    say(&Samples { name: "map, touch, unmap".to_owned(), nanos: cycle })?;

    let mut single = Vec::with_capacity(arguments.rounds);
    for round in 0..arguments.rounds {
        let page = device.map(bearer.next(arguments.rounds - round)?, arguments.gpa)?;
        page.read_u64(0)?;
        let start = Instant::now();
        let own = page.unmap()?;
        single.push(nanos(start)?);
        drop(own);
    }
    say(&Samples { name: "one UNMAP".to_owned(), nanos: single })?;

    let mut crowd = Crowd::open()?;
    for number in 0..arguments.mappings {
        crowd.map(bearer.next(arguments.mappings - number)?, arguments.gpa)?;
    }
    let start = Instant::now();
    let pages = crowd.close();
    say(&Samples { name: "close, all mappings".to_owned(), nanos: vec![nanos(start)?] })?;
    drop(pages);
    Ok(())
}

fn nanos(start: Instant) -> Result<u64> {
    Ok(u64::try_from(start.elapsed().as_nanos())?)
}

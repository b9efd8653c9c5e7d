// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Times the same scattered pages read over KVMI, by pread on a view, and through its mapping.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use kvmmem::{Access, Endpoint, Listener, PAGE_SIZE, Range, View};
use kvmmem_probe::Samples;

use crate::{say, spy};

/// Rounds of each way.
const ROUNDS: usize = 5;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The vsock port to listen on for the host.
    #[arg(long)]
    port: u32,
    /// First guest-physical address.
    #[arg(long)]
    from: u64,
    /// How many bytes the pages are spread over.
    #[arg(long)]
    len: u64,
    /// How many pages.
    #[arg(long)]
    pages: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let Arguments { port, from, len, pages } = *arguments;
    let listener = Listener::bind(&Endpoint::Vsock(port))?;
    let mut session = listener.accept(Duration::from_secs(120))?;
    let view = View::attach(&spy::token()?, Access::ReadOnly)?;
    let mapping = view.map(Range { gpa: from, len })?;
    // A multiplier without a common divisor spreads them over the range, in no order.
    let all = len / PAGE_SIZE as u64;
    let offsets: Vec<u64> =
        (0..pages).map(|n| n.wrapping_mul(0x9e37_79b1) % all * PAGE_SIZE as u64).collect();
    let mut page = [0; PAGE_SIZE];

    let (mut kvmi, mut pread, mut mapped) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        kvmi.push(timed(&offsets, |at| Ok(session.read_physical(from + at, &mut page)?))?);
        pread.push(timed(&offsets, |at| Ok(view.read_at(from + at, &mut page)?))?);
        mapped.push(timed(&offsets, |at| Ok(mapping.read(at, &mut page)?))?);
    }
    for (name, nanos) in [("KVMI", kvmi), ("pread", pread), ("mapping", mapped)] {
        say(&Samples { name: name.to_owned(), nanos })?;
    }
    Ok(())
}

fn timed(offsets: &[u64], mut read: impl FnMut(u64) -> Result<()>) -> Result<u64> {
    let start = Instant::now();
    offsets.iter().try_for_each(|at| read(*at))?;
    u64::try_from(start.elapsed().as_nanos()).context("too long")
}

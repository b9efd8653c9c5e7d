// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Times what a v1 tool does most: map, first touch, unmap; and closing a file full of mappings.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use kvmmem::Page;
use kvmmem_abi::ioctl::MapMemToken;
use kvmmem_probe::Samples;
use kvmmem_sys::device::Device;

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

/// Tokens fetched at once, and how long the host then gets to settle: what it does after giving a
/// token away is not what is timed.
const BATCH: usize = 32;
const SETTLE: Duration = Duration::from_millis(100);

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    // A tool's own tokens where the mapping is timed, quicker ones where it is not.
    let (mut tokens, mut bearer) = (Tokens::open(Some(arguments.port))?, Tokens::open(None)?);
    let device = Device::open(Path::new("/dev/kvmmem"))?;
    let page = Page::new()?;

    let mut cycle = Vec::new();
    while cycle.len() < arguments.rounds {
        let batch = (0..BATCH).map(|_| tokens.next(BATCH)).collect::<Result<Vec<_>>>()?;
        std::thread::sleep(SETTLE);
        for token in batch {
            let token = MapMemToken { token: token.words() };
            let start = Instant::now();
            device.map(token, arguments.gpa, &page)?;
            page.read_u64(0)?;
            device.unmap(&page)?;
            cycle.push(nanos(start)?);
        }
    }
    say(&Samples { name: "map, touch, unmap".to_owned(), nanos: cycle })?;
    let crowd = Crowd::of(arguments.mappings, arguments.gpa, &mut bearer)?;
    let mut single = Vec::with_capacity(arguments.mappings);
    for page in crowd.pages() {
        let start = Instant::now();
        crowd.unmap(page)?;
        single.push(nanos(start)?);
    }
    say(&Samples { name: "one UNMAP".to_owned(), nanos: single })?;
    drop(crowd.close());

    let crowd = Crowd::of(arguments.mappings, arguments.gpa, &mut bearer)?;
    let start = Instant::now();
    let pages = crowd.close();
    say(&Samples { name: "close, all mappings".to_owned(), nanos: vec![nanos(start)?] })?;
    drop(pages);
    Ok(())
}

fn nanos(start: Instant) -> Result<u64> {
    Ok(u64::try_from(start.elapsed().as_nanos())?)
}

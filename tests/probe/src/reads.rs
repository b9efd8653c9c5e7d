// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Times what a tool gets out of the library: attaching, bulk reads, and reads here and there, with
//! the same of its own memory.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem::{Access, PAGE_SIZE, Range, View};
use kvmmem_probe::Samples;

use crate::{say, spy};

/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;

/// Pages and words that are read here and there.
const PAGES: u64 = 512;
const WORDS: u64 = 4096;

#[derive(Args)]
pub(crate) struct Arguments {
    /// First guest-physical address.
    #[arg(long)]
    from: u64,
    /// How many bytes are read.
    #[arg(long)]
    len: u64,
    /// Rounds of each series.
    #[arg(long)]
    rounds: usize,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let Arguments { from, len, rounds } = *arguments;
    let token = spy::token()?;
    let mut attach = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        let view = View::attach(&token, Access::ReadOnly)?;
        view.read_at(from, &mut [0; 8])?;
        attach.push(nanos(start)?);
        view.detach()?;
    }
    say(&Samples { name: "attach, first bytes".to_owned(), nanos: attach })?;

    let view = View::attach(&token, Access::ReadOnly)?;
    let mapping = view.map(Range { gpa: from, len })?;
    let own = vec![1; usize::try_from(len)?];
    let pieces: Vec<u64> = (0..len).step_by(PIECE).collect();
    let (pages, words) = (scattered(PAGES, PAGE_SIZE, len), scattered(WORDS, 8, len));
    let mut piece = vec![0; PIECE];
    let from_own = |at: u64, to: &mut [u8]| -> Result<()> {
        let at = usize::try_from(at)?;
        to.copy_from_slice(black_box(&own).get(at..at + to.len()).context("out of range")?);
        black_box(to);
        Ok(())
    };
    for (kind, places, size) in
        [("sequential", &pieces, PIECE), ("pages", &pages, PAGE_SIZE), ("words", &words, 8)]
    {
        let part = piece.get_mut(..size).context("too long")?;
        let (mut owns, mut preads, mut mapped) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            owns.push(timed(places, |at| from_own(at, part))?);
            preads.push(timed(places, |at| Ok(view.read_at(from + at, part)?))?);
            mapped.push(timed(places, |at| Ok(mapping.read(at, part)?))?);
        }
        for (by, nanos) in [("own", owns), ("read_at", preads), ("mapping", mapped)] {
            say(&Samples { name: format!("{kind}, {by}"), nanos })?;
        }
    }
    Ok(())
}

/// Places of `count` pieces of `size` bytes, spread over `len` bytes in no order.
fn scattered(count: u64, size: usize, len: u64) -> Vec<u64> {
    let size = size as u64;
    (0..count).map(|n| n.wrapping_mul(0x9e37_79b1) % (len / size) * size).collect()
}

fn timed(places: &[u64], mut read: impl FnMut(u64) -> Result<()>) -> Result<u64> {
    let start = Instant::now();
    places.iter().try_for_each(|at| read(*at))?;
    nanos(start)
}

fn nanos(start: Instant) -> Result<u64> {
    u64::try_from(start.elapsed().as_nanos()).context("too long")
}

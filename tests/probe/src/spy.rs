// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tool of the demo's second act: a view from its beginning to its end, which the owner makes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use kvmmem::{Access, Event, Mapping, MappingError, Range, Token, View, ViewError};
use kvmmem_probe::{COUNTER, MARKER_LEN, Ready, hex};

use crate::{say, step};

/// How long to wait for what the target or the owner does.
const PATIENCE: Duration = Duration::from_secs(120);

/// How much is copied and searched at a time.
const PIECE: usize = 1 << 20;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Where the marker's page is in the target.
    #[arg(long)]
    gpa: u64,
    /// The marker in hex.
    #[arg(long)]
    marker: String,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let token = token()?;
    let mut view = None;
    step("one token attaches a view", || {
        let view = view.insert(View::attach(&token, Access::Granted)?);
        let ranges = view.ranges()?;
        let list: Vec<_> =
            ranges.iter().map(|range| format!("{:#x}+{:#x}", range.gpa, range.len)).collect();
        Ok((!ranges.is_empty(), list.join(", ")))
    })?;
    let view = view.context("no view: nothing more can be tried")?;

    let mut mapping = None;
    step("the whole RAM is mapped, and costs nothing yet", || {
        let range = *view.ranges()?.first().context("no range")?;
        let mapping = mapping.insert(view.map(range)?);
        Ok((true, format!("{} MiB", mapping.len() >> 20)))
    })?;
    let mapping = mapping.context("nothing mapped: nothing more can be tried")?;

    step("a scan of what the target uses finds the marker", || {
        let (found, bytes) = scan(&view, &mapping, &arguments.marker)?;
        Ok((
            found.contains(&arguments.gpa),
            format!("{} places in {} MiB", found.len(), bytes >> 20),
        ))
    })?;
    step("its counter runs, seen by plain loads", || {
        let at = arguments.gpa - mapping.gpa() + COUNTER as u64;
        let (first, end) = (mapping.read_u64(at)?, Instant::now() + PATIENCE);
        let mut last = first;
        while last < first + 5 && Instant::now() < end {
            last = mapping.read_u64(at)?;
        }
        Ok((last >= first + 5, format!("{first} to {last}")))
    })?;

    say(&Ready { ready: std::process::id() })?;
    step("the owner takes the grant back, and poll tells", || {
        let event = view.wait(PATIENCE)?;
        Ok((event == Some(Event::Revoked), format!("{event:?}")))
    })?;
    step("a load from the mapping is an error, not the process's end", || {
        let at = arguments.gpa - mapping.gpa();
        match mapping.read_u64(at) {
            Err(MappingError::Lost { gpa }) => Ok((true, format!("lost at {gpa:#x}"))),
            other => Ok((false, format!("{other:?}"))),
        }
    })?;
    step("and read_at reports that the grant was revoked", || {
        match view.read_at(arguments.gpa, &mut [0; 8]) {
            Err(error @ ViewError::Revoked { .. }) => Ok((true, error.to_string())),
            other => Ok((false, format!("{other:?}"))),
        }
    })?;
    Ok(())
}

/// The token in the environment.
pub(crate) fn token() -> Result<Token> {
    Ok(std::env::var("KVMMEM_TOKEN").context("KVMMEM_TOKEN is not set")?.parse()?)
}

/// Where the marker is, page by page, and how many bytes held data.
fn scan(view: &View, mapping: &Mapping, marker: &str) -> Result<(Vec<u64>, u64)> {
    let (mut found, mut bytes) = (Vec::new(), 0);
    let mut buffer = vec![0; PIECE];
    let mut from = mapping.gpa();
    while let Some(Range { gpa, len }) = view.data_from(from)? {
        let mut at = gpa;
        while at < gpa + len {
            let part = usize::try_from((gpa + len - at).min(PIECE as u64))?;
            let part = buffer.get_mut(..part).context("no buffer")?;
            mapping.read(at - mapping.gpa(), part)?;
            for (page, start) in
                part.chunks(kvmmem::PAGE_SIZE).zip((at..).step_by(kvmmem::PAGE_SIZE))
            {
                if page.get(..MARKER_LEN).is_some_and(|head| hex(head) == marker) {
                    found.push(start);
                }
            }
            at += part.len() as u64;
        }
        bytes += len;
        from = gpa + len;
    }
    Ok((found, bytes))
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A tool that reads the same bytes again and again until its view has ended, and counts what it
//! reads that is not them.

use anyhow::{Context, Result};
use clap::Args;
use kvmmem::{Access, PAGE_SIZE, Range, View, ViewError};
use kvmmem_probe::{MARKER_LEN, Ready, hex};

use crate::{say, spy, step};

/// Reads before it says that it reads.
const FIRST: u64 = 20;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Where the bytes are in the target.
    #[arg(long)]
    gpa: u64,
    /// The bytes in hex.
    #[arg(long)]
    bytes: String,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let token = spy::token()?;
    let mut view = None;
    step("it attaches a view", || {
        let view = view.insert(View::attach(&token, Access::ReadOnly)?);
        Ok((true, format!("{:?}", view.ranges()?)))
    })?;
    let view = view.context("no view: nothing more can be tried")?;
    let page = arguments.gpa & !(PAGE_SIZE as u64 - 1);
    let mapping = match view.map(Range { gpa: page, len: PAGE_SIZE as u64 }) {
        Ok(mapping) => Some(mapping),
        // By the proxy, which copies.
        Err(ViewError::Private { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    step("it reads until the view has ended, and nothing but the view's bytes", || {
        let (mut right, mut wrong, mut rounds) = (0, 0, 0);
        let error = loop {
            let mut bytes = [0; MARKER_LEN];
            if let Err(error) = view.read_at(arguments.gpa, &mut bytes) {
                break error.to_string();
            }
            let is_right = |bytes: &[u8]| u64::from(hex(bytes) == arguments.bytes);
            (right, wrong) = (right + is_right(&bytes), wrong + 1 - is_right(&bytes));
            if let Some(mapping) = &mapping {
                bytes.fill(0);
                if let Err(error) = mapping.read(arguments.gpa - page, &mut bytes) {
                    break error.to_string();
                }
                (right, wrong) = (right + is_right(&bytes), wrong + 1 - is_right(&bytes));
            }
            rounds += 1;
            if rounds == FIRST {
                say(&Ready { ready: std::process::id() })?;
            }
        };
        Ok((wrong == 0, format!("{right} right, {wrong} wrong, then: {error}")))
    })?;
    Ok(())
}

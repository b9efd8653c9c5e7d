// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hands the scenario tokens that a tool in the introspector gets over KVMI: one, in hex, for each
//! line of standard input.

use std::io::stdin;

use anyhow::Result;
use clap::Args;
use kvmmem_probe::Ready;

use crate::say;
use crate::tokens::Tokens;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The vsock port to listen on for the host.
    #[arg(long)]
    port: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut tokens = Tokens::open(Some(arguments.port))?;
    say(&Ready { ready: std::process::id() })?;
    for line in stdin().lines() {
        line?;
        println!("{}", tokens.next(1)?.to_hex().as_str());
    }
    Ok(())
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tool of the demo: everything a user of v1 does, once around.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use kvmmem::{Device, Endpoint, Listener, PAGE_SIZE};
use kvmmem_probe::{COUNTER, INBOX, MARKER, MARKER_LEN, hex};

use crate::{step, tokens};

/// How long to wait for the host to call, and for the counter to move.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Args)]
pub(crate) struct Arguments {
    /// The vsock port to listen on for the host.
    #[arg(long)]
    port: u32,
    /// Where the marker's page is in the target.
    #[arg(long)]
    gpa: u64,
    /// The marker in hex.
    #[arg(long)]
    marker: String,
    /// The word to write into the target's inbox.
    #[arg(long)]
    message: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let listener = Listener::bind(&Endpoint::Vsock(arguments.port))?;
    let mut session = None;
    step("the host connects by vsock and shakes hands", || {
        let session = session.insert(listener.accept(PATIENCE)?);
        Ok((true, format!("VM {:?}", session.name())))
    })?;
    let mut session = session.context("no session: nothing more can be tried")?;

    step("KVMI reads the marker by copy", || {
        let mut seen = [0; MARKER_LEN];
        session.read_physical(arguments.gpa, &mut seen)?;
        Ok((hex(&seen) == arguments.marker, hex(&seen)))
    })?;

    let device = Device::open_default()?;
    let mut token = None;
    step("KVMI gives a token", || {
        token = Some(tokens::token(&mut session)?);
        Ok((true, String::new()))
    })?;
    let mut mapped = None;
    step("MAP replaces a page of the tool by the target's", || {
        let token = token.take().context("no token")?;
        mapped = Some(device.map(token, arguments.gpa)?);
        Ok((true, String::new()))
    })?;
    let page = mapped.context("nothing mapped: nothing more can be tried")?;

    step("the mapped page shows the marker", || {
        let mut seen = [0; MARKER_LEN];
        page.read(MARKER, &mut seen)?;
        Ok((hex(&seen) == arguments.marker, hex(&seen)))
    })?;
    step("the counter runs, seen by plain loads", || {
        let first = page.read_u64(COUNTER)?;
        let end = Instant::now() + PATIENCE;
        let mut last = first;
        let mut moves = 0;
        while moves < 5 && Instant::now() < end {
            let seen = page.read_u64(COUNTER)?;
            if seen != last {
                moves += 1;
                last = seen;
            }
        }
        Ok((moves == 5 && last > first, format!("{first} to {last}")))
    })?;
    step("a plain store reaches the target", || {
        page.write_u64(INBOX, arguments.message)?;
        let mut seen = [0; 8];
        session.read_physical(arguments.gpa + INBOX as u64, &mut seen)?;
        Ok((
            u64::from_le_bytes(seen) == arguments.message,
            format!("{:#x}", u64::from_le_bytes(seen)),
        ))
    })?;

    let mut own = None;
    step("UNMAP gives the page back", || {
        own = Some(page.unmap()?);
        Ok((true, String::new()))
    })?;
    step("what is left is a page of zeros", || {
        let own = own.take().context("no page")?;
        let mut seen = [0xff; PAGE_SIZE];
        own.read(0, &mut seen)?;
        Ok((seen.iter().all(|byte| *byte == 0), String::new()))
    })?;
    Ok(())
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `ask CID PROGRAM ARGS`: runs a program in the VM with this vsock context id, by its agent.
#![deny(unsafe_code)]

use std::io::{Write as _, stderr, stdout};
use std::process::ExitCode;
use std::time::Duration;

use kvmmem_guest::{Agent, Command};

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(cid), Some(program)) = (args.next(), args.next()) else {
        return Err("usage: ask CID PROGRAM ARGS".into());
    };
    let agent = Agent::connect(cid.parse()?, Duration::from_secs(120))?;
    let output = agent.run(&Command::new(program).args(args), Duration::from_secs(60))?;
    stdout().write_all(&output.stdout)?;
    stderr().write_all(&output.stderr)?;
    Ok(ExitCode::from(u8::try_from(output.status.shell_code()).unwrap_or(1)))
}

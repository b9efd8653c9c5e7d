// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `ask CID [+FILE]... PROGRAM ARGS`: runs a program in the VM with this vsock context id, by its
//! agent; before, it puts each FILE into the VM's `/tmp`.
#![deny(unsafe_code)]

use std::io::{Write as _, stderr, stdout};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use kvmmem_guest::{Agent, Command};

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).peekable();
    let cid = args.next().ok_or("usage: ask CID [+FILE]... PROGRAM ARGS")?;
    let agent = Agent::connect(cid.parse()?, Duration::from_secs(120))?;
    while let Some(file) = args.next_if(|arg| arg.starts_with('+')) {
        let path = Path::new(file.trim_start_matches('+'));
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        agent.put(&format!("/tmp/{name}"), 0o755, &std::fs::read(path)?)?;
    }
    let program = args.next().ok_or("no program given")?;
    let output = agent.run(&Command::new(program).args(args), Duration::from_secs(60))?;
    stdout().write_all(&output.stdout)?;
    stderr().write_all(&output.stderr)?;
    Ok(ExitCode::from(u8::try_from(output.status.shell_code()).unwrap_or(1)))
}

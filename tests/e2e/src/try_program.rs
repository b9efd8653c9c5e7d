// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask try`: a user's own program in the introspector of a booted pair.

use std::io::{Write, stderr, stdout};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem_client::admin::GrantRequest;
use kvmmem_guest::Command;

use crate::test_bed::TestBed;
use crate::world::World;

/// How long the program may run.
const LIMIT: Duration = Duration::from_secs(600);

#[derive(Args)]
pub(crate) struct Arguments {
    /// The program, as it is named in the test bed's folder `try`, and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let mut world = World::start(TestBed::from_env()?)?;
    let (name, rest) = arguments.program.split_first().context("no program")?;
    let port = world.hook_port()?;
    let (gpa, max_gfn) = (world.gpa()?, world.max_gfn()?);
    let marker = world.marker()?.hex.clone();
    let grant =
        world.grant_as(|request| GrantRequest { uses: 1000, ttl_ms: 600_000, ..request })?;
    let token = grant.token.to_hex();

    let agent = world.agent()?;
    for entry in std::fs::read_dir(world.bed.brought()).context("the bed has no folder try")? {
        let path = entry.context("cannot list the folder try")?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bytes =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        agent.put(&format!("/tmp/try/{file}"), 0o755, &bytes)?;
    }
    let command = Command::new(format!("/tmp/try/{name}"))
        .args(rest.iter().cloned())
        .as_member()
        .memlock(64 << 20)
        .cwd("/tmp/try")
        .env("KVMMEM_DEVICE", "/dev/kvmmem")
        .env("KVMMEM_KVMI_PORT", port.to_string())
        .env("KVMMEM_TARGET_GPA", format!("{gpa:#x}"))
        .env("KVMMEM_TARGET_MAX_GFN", format!("{max_gfn:#x}"))
        .env("KVMMEM_TOKEN", token.as_str())
        .env("KVMMEM_MARKER_HEX", marker);
    let mut child = agent.spawn(&command)?;
    while let Some(line) = child.read_line(LIMIT)? {
        println!("{line}");
    }
    let status = child.wait(LIMIT)?;
    stdout().flush()?;
    stderr().write_all(child.take_stderr().as_bytes())?;
    Ok(u8::try_from(status.shell_code()).unwrap_or(u8::MAX))
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Direct host: the scenarios' program runs on this machine itself.

use std::io::{Read as _, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::host_kind::HostKind;
use crate::test_bed::Job;

/// Runs `job` with the test bed in `folder`, its stdout to `out`; returns its exit code.
pub(crate) fn run(job: &Job, folder: &Path, out: &mut dyn Write) -> Result<i32> {
    let mut child = Command::new(folder.join(&job.program))
        .args(&job.args)
        .env("KVMMEM_TEST_BED", folder)
        .env("KVMMEM_TEST_BED_HOST", HostKind::Direct.name())
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", job.program))?;
    let mut stdout = child.stdout.take().context("no stdout of the program")?;
    let (sender, pieces) = mpsc::sync_channel(16);
    thread::spawn(move || {
        let mut bytes = vec![0; 4096];
        while let Ok(length @ 1..) = stdout.read(&mut bytes) {
            if sender.send(bytes.get(..length).unwrap_or_default().to_vec()).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + job.limit;
    loop {
        match pieces.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(piece) => out
                .write_all(&piece)
                .and_then(|()| out.flush())
                .context("cannot write the output")?,
            Err(RecvTimeoutError::Disconnected) => {
                let status = child.wait()?;
                return Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
            }
            Err(RecvTimeoutError::Timeout) => {
                child.kill()?;
                child.wait()?;
                bail!("{} was stopped after its limit of {} s", job.program, job.limit.as_secs());
            }
        }
    }
}

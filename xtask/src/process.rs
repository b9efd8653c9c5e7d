// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A process that runs beside the checks of a suite: a VM or the broker. It ends with them.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::interrupt;

/// How long anything may take that is waited for: some ten seconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(900);

/// The process; killed on drop.
#[derive(Debug)]
pub(crate) struct Process(Child);

impl Process {
    /// Starts it; what it prints goes to the end of `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let log = OpenOptions::new().create(true).append(true).open(log)?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        child.map(Self).with_context(|| format!("cannot run {}", command.get_program().display()))
    }

    /// Waits until `is_there`.
    pub(crate) fn wait(&mut self, what: &str, mut is_there: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while !is_there() {
            if let Some(status) = self.0.try_wait()? {
                bail!("it ended while waiting for {what}: {status}");
            }
            ensure!(Instant::now() < deadline, "still waiting for {what}");
            ensure!(!interrupt::was_seen(), "interrupted");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

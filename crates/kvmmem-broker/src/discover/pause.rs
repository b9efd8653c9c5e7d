// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VM that the broker's clients hold stopped.
//!
//! It runs again when the last of them needs it no more, when the connection to its QEMU is lost and made anew, and when the
//! broker ends, however it ends: while the VM is stopped a shell waits for that, at the end of a pipe, with a copy of the
//! connection. A VM that did not run before stays as it is.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use serde_json::json;

use super::questions::AskError;
use crate::qmp::{Qmp, QmpError};

/// Waits for a line or the end of standard input; at the end, resumes the VM. QEMU forgets commands of a connection that has
/// ended, so the connection is kept for a while.
const WATCH: &str =
    r#"trap '' HUP INT TERM; read -r line || { echo '{"execute":"cont"}'; exec 0<&- sleep 10; }"#;

/// Who holds the VM stopped.
#[derive(Debug, Default)]
pub(super) struct Stopped {
    holders: BTreeSet<u64>,
    /// Present while the VM is stopped that ran before.
    watcher: Option<Watcher>,
    /// The VM is to run again as soon as QEMU can be asked.
    owes: bool,
}

impl Stopped {
    /// Stops the VM for one more, or checks that it is still stopped. Returns whether it ran before all of them.
    pub(super) fn hold(&mut self, qmp: &mut Qmp, holder: u64, is_new: bool) -> Result<bool, AskError> {
        if !is_new && !self.holders.contains(&holder) {
            return Err(AskError::Resumed);
        }
        let is_running = qmp.status()? == "running";
        if is_running && !self.holders.is_empty() {
            // Somebody else has resumed it: none of them can rely on it.
            *self = Self::default();
            return Err(AskError::Resumed);
        }
        if is_running {
            let watcher = Watcher::start(qmp).map_err(AskError::Watcher)?;
            if let Err(error) = qmp.execute("stop", json!({})) {
                // It may have been carried out.
                self.owes = !error.is_refusal();
                return Err(error.into());
            }
            self.watcher = Some(watcher);
        }
        self.holders.insert(holder);
        Ok(self.watcher.is_some())
    }

    /// One holder less.
    pub(super) fn release(&mut self, qmp: &mut Qmp, holder: u64) -> Result<(), AskError> {
        if !self.holders.remove(&holder) {
            return Err(AskError::Resumed);
        }
        if self.holders.is_empty() { Ok(self.resume(qmp)?) } else { Ok(()) }
    }

    /// Ends the pause for all; where QEMU cannot be asked, once it can be.
    pub(super) fn end(&mut self, qmp: &mut Qmp) {
        self.holders.clear();
        // A failure is in the log, and the rest is for a new connection.
        let _ = self.resume(qmp);
    }

    /// Makes up for what could not be done over the connection before.
    pub(super) fn reconnected(&mut self, qmp: &mut Qmp) {
        if std::mem::take(&mut self.owes) {
            let _ = self.cont(qmp);
        }
    }

    fn resume(&mut self, qmp: &mut Qmp) -> Result<(), QmpError> {
        // Until then it is there in case that this process is killed. It must not hold the connection longer than this.
        let Some(_watcher) = self.watcher.take() else { return Ok(()) };
        self.cont(qmp)
    }

    fn cont(&mut self, qmp: &mut Qmp) -> Result<(), QmpError> {
        // What has become of it meanwhile, as the source of a migration, must not run.
        let result = qmp.status().and_then(|status| match status.as_str() {
            "paused" => qmp.execute("cont", json!({})).map(drop),
            _ => Ok(()),
        });
        if let Err(error) = &result {
            self.owes = !error.is_refusal();
            tracing::warn!(%error, qmp = ?qmp.path(), "a paused VM was not resumed");
        }
        result
    }
}

/// What resumes a VM if this process ends: a shell, which is there even after SIGKILL. Dropping it ends the shell.
#[derive(Debug)]
struct Watcher(Child);

impl Watcher {
    fn start(qmp: &Qmp) -> io::Result<Self> {
        let connection = qmp.as_fd().try_clone_to_owned()?;
        let mut shell = Command::new("/bin/sh");
        // Not in a group with this process, which signals of a terminal go to.
        shell.args(["-c", WATCH]).env_clear().env("PATH", "/usr/bin:/bin").current_dir("/").process_group(0);
        shell.stdin(Stdio::piped()).stdout(connection).stderr(Stdio::null()).spawn().map(Self)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // It has not been waited for, so it is there, if only as a zombie.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

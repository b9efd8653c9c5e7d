// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VM that the broker's clients hold stopped.
//!
//! It runs again when the last of them releases it, when the connection to its QEMU is lost and
//! made anew, and when the broker ends or hangs: while the VM is stopped a shell, with a copy of
//! the connection, waits for the end of a pipe, and for silence there. A VM that did not run before
//! stays as it is.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::io::ioctl_fionbio;
use serde_json::json;

use super::questions::AskError;
use crate::qmp::{Qmp, QmpError};

/// The shell. Standard input is the pipe, standard output the connection; `$1` is the silence that
/// ends a pause, seconds.
///
/// Where the pipe ends (dd's empty output, status 0) the broker has ended: QEMU forgets commands of
/// a connection that has ended, so the shell keeps it until `cont` is answered, or QEMU has not
/// answered for a minute. Where the pipe is silent (the status of a process that timeout has
/// killed, 137) the broker may read the answer itself. Where anything else goes wrong, which would
/// leave the VM without a shell, the VM runs as well.
const WATCH: &str = r#"
trap '' HUP INT TERM
command -v timeout >&2 && command -v dd >&2 || exit
exec 2>/dev/null
cont() { echo '{"execute":"cont","id":"resume"}'; }
trap cont EXIT
while :; do
    beat=$(timeout -s KILL "$1" dd bs=4096 count=1); status=$?
    [ "$beat" ] || break
done
[ $status -ne 137 ] || exit 0
[ $status -eq 0 ] || exit 1
trap - EXIT
cont
timeout -s KILL 60 sh -c 'while read -r line; do case $line in *\"resume\"*) exit;; esac; done' <&1
"#;

/// The clients that hold a VM stopped.
#[derive(Debug)]
pub(crate) struct Holders {
    /// How long no holder may ask.
    silence: Duration,
    holders: BTreeSet<u64>,
    /// Present while the VM is stopped that ran before.
    watcher: Option<Watcher>,
    /// The VM is to run again as soon as QEMU can be asked. There is no holder then.
    owes: bool,
    /// No client can hold the VM any more.
    is_closed: bool,
}

impl Holders {
    /// A VM that runs again when no holder has asked for `silence`.
    pub(crate) fn new(silence: Duration) -> Self {
        Self { silence, holders: BTreeSet::new(), watcher: None, owes: false, is_closed: false }
    }

    /// Stops the VM for one more, or checks that it is still stopped. Returns whether it ran before
    /// all of them.
    pub(crate) fn hold(
        &mut self,
        qmp: &mut Qmp,
        holder: u64,
        is_new: bool,
    ) -> Result<bool, AskError> {
        if self.is_closed {
            return Err(AskError::NoConnection);
        }
        self.notice_the_watcher(qmp);
        if self.owes {
            self.cont(qmp)?;
        }
        if !is_new && !self.holders.contains(&holder) {
            return Err(AskError::Resumed);
        }
        let is_running = qmp.status()? == "running";
        if is_running && !self.holders.is_empty() {
            // Another client of QEMU has resumed it: no holder can rely on it.
            self.forget();
            return Err(AskError::Resumed);
        }
        if is_running {
            let watcher = Watcher::start(qmp.as_fd(), self.silence).map_err(AskError::Watcher)?;
            if let Err(error) = qmp.execute("stop", json!({})) {
                // It may have been carried out.
                self.owes = !error.is_refusal();
                return Err(error.into());
            }
            self.watcher = Some(watcher);
        }
        self.holders.insert(holder);
        self.watcher.iter_mut().for_each(Watcher::beat);
        Ok(self.watcher.is_some())
    }

    /// One holder less. Fails where the VM ran before that.
    pub(crate) fn release(&mut self, qmp: &mut Qmp, holder: u64) -> Result<(), AskError> {
        self.notice_the_watcher(qmp);
        let was_held = self.holders.remove(&holder);
        // One that could not be added, or not be removed, may have left the VM stopped.
        let was_stopped = !self.holders.is_empty() || self.resume(qmp)?;
        (was_held && was_stopped).then_some(()).ok_or(AskError::Resumed)
    }

    /// Ends the pause for all; where QEMU cannot be asked, once it can be.
    pub(crate) fn end(&mut self, qmp: &mut Qmp) {
        self.holders.clear();
        // A failure is in the log, and the rest is for a new connection.
        let _ = self.resume(qmp);
    }

    /// Ends the pause for good, over the connection where there is one: no client can hold the VM
    /// afterwards. Returns whether the VM may still be stopped because QEMU did not answer.
    pub(crate) fn close(&mut self, qmp: Option<&mut Qmp>) -> bool {
        self.is_closed = true;
        match qmp {
            Some(qmp) => self.end(qmp),
            None => self.lost(),
        }
        self.owes
    }

    /// The connection is lost: the pause ends for all, once QEMU can be asked again.
    pub(crate) fn lost(&mut self) {
        self.holders.clear();
        self.owes |= self.watcher.take().is_some();
    }

    /// Whether the VM is to run again, and QEMU has not been able to be asked.
    pub(crate) fn owes(&self) -> bool {
        self.owes
    }

    /// Makes up for what could not be done over the connection before.
    pub(crate) fn reconnected(&mut self, qmp: &mut Qmp) {
        if self.owes {
            let _ = self.cont(qmp);
        }
    }

    /// Ends the pause for all where the shell has ended it, or has been killed.
    fn notice_the_watcher(&mut self, qmp: &mut Qmp) {
        match self.watcher.as_mut().and_then(Watcher::ended) {
            None => {}
            // What has become of the VM since is another client's doing.
            Some(status) if status.success() => self.forget(),
            Some(_) => self.end(qmp),
        }
    }

    fn forget(&mut self) {
        *self = Self::new(self.silence);
    }

    /// Lets the VM run that ran before. Returns whether it was still stopped.
    fn resume(&mut self, qmp: &mut Qmp) -> Result<bool, QmpError> {
        // Until QEMU has answered it is there in case that this process is killed. It must not hold
        // the connection longer than this.
        let watcher = self.watcher.take();
        if watcher.is_none() && !self.owes {
            return Ok(true);
        }
        self.cont(qmp)
    }

    fn cont(&mut self, qmp: &mut Qmp) -> Result<bool, QmpError> {
        // What has become of it meanwhile, as the source of a migration, must not run.
        let result = qmp.status().and_then(|status| match status.as_str() {
            "paused" => qmp.execute("cont", json!({})).map(|_| true),
            status => Ok(status != "running"),
        });
        self.owes = result.as_ref().is_err_and(|error| !error.is_refusal());
        if let Err(error) = &result {
            tracing::warn!(%error, qmp = ?qmp.path(), "a paused VM was not resumed");
        }
        result
    }
}

/// What resumes a VM if this process ends or hangs: a shell, which is there even after SIGKILL.
/// Dropping it ends the shell.
#[derive(Debug)]
struct Watcher(Child);

impl Watcher {
    fn start(connection: BorrowedFd<'_>, silence: Duration) -> io::Result<Self> {
        // A client that is silent for so long is disconnected before.
        let limit = (silence.as_secs_f64() * 1.5).ceil().max(1.0).to_string();
        let mut shell = Command::new("/bin/sh");
        shell
            .args(["-c", WATCH, "sh", &limit])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .current_dir("/");
        // Not in a group with this process, which signals of a terminal go to.
        shell.process_group(0).stdin(Stdio::piped()).stdout(connection.try_clone_to_owned()?);
        let mut watcher = Self(shell.stderr(Stdio::piped()).spawn()?);
        if let Some(pipe) = &watcher.0.stdin {
            // Of a shell that is stopped no beat must wait.
            ioctl_fionbio(pipe, true)?;
        }
        let mut ready = String::new();
        if let Some(errors) = &mut watcher.0.stderr {
            errors.read_to_string(&mut ready)?;
        }
        match ready.lines().count() {
            2 => Ok(watcher),
            _ => Err(io::Error::new(
                io::ErrorKind::NotFound,
                "timeout and dd are not both in /usr/bin or /bin",
            )),
        }
    }

    /// Puts the end by silence off.
    fn beat(&mut self) {
        if let Some(pipe) = &mut self.0.stdin {
            // A full pipe is not silent, and that the shell has ended is noticed elsewhere.
            let _ = pipe.write(b".");
        }
    }

    /// How the shell has ended, if it has.
    fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok()?
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // It has not been waited for, so it is there, if only as a zombie.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests;

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! CPU load beside the tests, as on a shared machine: `cargo xtask test --load`.

use std::hint::spin_loop;
use std::process::{Child, Command};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// The hidden verb of such a process.
pub(crate) const VERB: &str = "busy";

/// Busy processes; they end with this, and with this process however it ends.
pub(crate) struct Load(Vec<Child>);

impl Load {
    pub(crate) fn start(count: u32) -> Result<Self> {
        let program = std::env::current_exe().context("no path of this program")?;
        let mut load = Self(Vec::new());
        for _ in 0..count {
            let mut command = Command::new(&program);
            command.args([VERB, &std::process::id().to_string()]);
            load.0.push(command.spawn().context("cannot start a busy process")?);
        }
        Ok(load)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Both fail only if it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Keeps one CPU busy until `parent` ends.
pub(crate) fn busy(parent: i32) -> Result<i32> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot follow the parent's end")?;
    // It may have ended before that call.
    if getppid() != Pid::from_raw(parent) {
        bail!("the process that wanted this one busy has ended");
    }
    loop {
        spin_loop();
    }
}

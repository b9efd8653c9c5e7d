// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What sets a process apart from all others.

use sha2::{Digest, Sha256};

use super::Process;

impl Process {
    /// When it was started, clock ticks since the host was; `None` where the kernel does not say.
    /// No two processes have this and the number in common.
    pub fn started(&self) -> Option<u64> {
        let stat = self.read("stat", "the state", 4096).ok()?;
        let stat = String::from_utf8_lossy(&stat).into_owned();
        // The name before the last parenthesis is the process's own choice; the start time is the
        // 20th word behind it.
        stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
    }

    /// What sets this process apart from all others of this host, also of other boots: a digest of
    /// the boot's id, its number and its start. `None` where the kernel does not say.
    pub fn identity(&self) -> Option<[u8; 32]> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let identity = format!("kvmmem process {} {} {}", boot.trim(), self.pid, self.started()?);
        Some(Sha256::digest(identity).into())
    }

    /// When it was started, milliseconds since the epoch; `None` where the kernel does not say.
    pub fn start_time_ms(&self) -> Option<i64> {
        let ticks = i64::try_from(self.started()?).ok()?;
        let per_second = i64::try_from(rustix::param::clock_ticks_per_second()).ok()?;
        let boot = std::fs::read_to_string("/proc/stat").ok()?;
        let boot: i64 =
            boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        boot.checked_mul(1000)?.checked_add(ticks.checked_mul(1000)?.checked_div(per_second)?)
    }
}

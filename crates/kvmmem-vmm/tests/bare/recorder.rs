// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Recorder of the system calls of a child process, by the kernel's tracepoint
//! `raw_syscalls:sys_enter` in an instance of its own. Needs root.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::thread::gettid;
use tempfile::TempDir;

/// seccomp(2) with the argument that installs a filter.
const INSTALLS_FILTER: &str = "NR 317 (1,";

/// Records the children that the calling thread starts from now on. Gone when dropped.
pub(crate) struct Recorder {
    tracefs: TempDir,
    own: String,
}

impl Recorder {
    /// `None`, with the reason printed, where this process may not trace.
    pub(crate) fn start() -> Option<Self> {
        let tracefs = tempfile::tempdir().unwrap();
        if let Err(error) = mount("tracefs", tracefs.path(), "tracefs", MountFlags::empty(), None) {
            eprintln!("skipped: tracefs cannot be mounted ({error}): run as root");
            return None;
        }
        let this = Self { tracefs, own: gettid().as_raw_nonzero().to_string() };
        fs::create_dir(this.instance()).unwrap();
        for (file, text) in [
            ("buffer_size_kb", "16384"),
            ("options/event-fork", "1"),
            ("set_event_pid", &this.own),
            // ioctl is most of a machine's calls.
            ("events/raw_syscalls/sys_enter/filter", "id != 16"),
            ("events/raw_syscalls/sys_enter/enable", "1"),
        ] {
            fs::write(this.instance().join(file), text)
                .unwrap_or_else(|error| panic!("cannot write {text:?} to {file}: {error}"));
        }
        Some(this)
    }

    /// The calls that children have made since they installed a filter.
    pub(crate) fn since_filter(&self) -> BTreeSet<i64> {
        // Reading would be recorded as well, without end.
        fs::write(self.instance().join("tracing_on"), "0").unwrap();
        let trace = fs::read_to_string(self.instance().join("trace")).unwrap();
        let mut calls = trace.lines().filter(|line| pid(line).is_some_and(|pid| pid != self.own));
        assert!(calls.any(|line| line.contains(INSTALLS_FILTER)), "no filter in the trace");
        calls
            .map(|line| line.rsplit_once(" NR ").unwrap().1.split(' ').next().unwrap())
            .map(|number| number.parse().unwrap())
            .collect()
    }

    fn instance(&self) -> PathBuf {
        self.tracefs.path().join(format!("instances/kvmmem-{}", self.own))
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = fs::write(self.instance().join("events/raw_syscalls/sys_enter/enable"), "0");
        let _ = fs::remove_dir(self.instance());
        let _ = unmount(self.tracefs.path(), UnmountFlags::empty());
    }
}

/// The thread of a line such as `vcpu0-12 [000] ..... 1.5: sys_enter: NR 0 (3, 0, 0, 0, 0, 0)`.
fn pid(line: &str) -> Option<&str> {
    let (thread, _) = line.split_once(" [").filter(|_| line.contains(" NR "))?;
    // A column for the process may follow.
    thread
        .split_once(" (")
        .map_or(thread, |(thread, _)| thread)
        .trim()
        .rsplit_once('-')
        .map(|(_, pid)| pid)
}

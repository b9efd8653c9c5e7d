// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Verbs that wait in the middle: for a reader, or for a signal to go on.

use std::fs;
use std::io::{PipeReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use super::{Ended, finish, signal, wait_for};

/// A verb whose output nothing reads, and which has filled the pipe.
pub(crate) struct Blocked {
    child: Child,
    reader: PipeReader,
}

impl Blocked {
    /// Starts it, and waits until the pipe is full.
    pub(crate) fn start(mut command: Command) -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        let child = command.stdout(writer.try_clone().unwrap()).spawn().unwrap();
        drop(command);
        wait_for(Path::new("the pipe to be full"), |_| {
            let mut fds = [PollFd::new(&writer, PollFlags::OUT)];
            poll(&mut fds, Some(&Timespec::default())).unwrap() == 0
        });
        Self { child, reader }
    }

    /// Reads what it writes until it ends.
    pub(crate) fn end(mut self) -> (Ended, Vec<u8>) {
        let mut bytes = Vec::new();
        self.reader.read_to_end(&mut bytes).unwrap();
        (finish(self.child), bytes)
    }
}

/// Stops a process; returns once none of its threads runs. `false` where it had ended before.
pub(crate) fn stop(child: &Child) -> bool {
    signal(child, Signal::STOP);
    let threads = PathBuf::from(format!("/proc/{}/task", child.id()));
    let are_all = |state: &str| {
        fs::read_dir(&threads).unwrap().all(|thread| {
            // A thread may end meanwhile.
            let stat = fs::read_to_string(thread.unwrap().path().join("stat"));
            stat.is_ok_and(|stat| stat.contains(state))
        })
    };
    // It runs for a moment after the signal was sent.
    wait_for(&threads, |_| are_all(") T ") || are_all(") Z "));
    are_all(") T ")
}

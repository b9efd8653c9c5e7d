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

/// Stops a process; returns once none of its threads runs.
pub(crate) fn stop(child: &Child) {
    signal(child, Signal::STOP);
    // One that has ended does not stop.
    let is_still = |thread: &Path| {
        fs::read_to_string(thread.join("stat"))
            .is_ok_and(|stat| stat.contains(") T ") || stat.contains(") Z "))
    };
    wait_for(&PathBuf::from(format!("/proc/{}/task", child.id())), |threads| {
        fs::read_dir(threads).unwrap().all(|thread| is_still(&thread.unwrap().path()))
    });
}

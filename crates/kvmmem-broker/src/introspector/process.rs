// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The process of an introspector's QEMU.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::Signal;

/// A process; whoever gets its number later is another one.
#[derive(Debug)]
pub(super) struct Process {
    pidfd: OwnedFd,
}

impl Process {
    pub(super) fn new(pidfd: OwnedFd) -> Self {
        Self { pidfd }
    }

    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether it has not ended.
    pub(super) fn is_alive(&self) -> bool {
        !self.wait(Instant::now())
    }

    /// Waits until it has ended; `false` where it has not in time. What it had mapped is unmapped
    /// then.
    pub(super) fn wait(&self, deadline: Instant) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).ok();
            match rustix::event::poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], left.as_ref())
            {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Ends it at once.
    pub(super) fn kill(&self) -> Result<(), Errno> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

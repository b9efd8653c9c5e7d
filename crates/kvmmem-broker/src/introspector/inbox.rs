// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker has pushed to an introspector and its thread has not handled yet.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::view::lock;
use crate::peer::Viewer;

/// One push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Notice {
    /// A grant was revoked.
    Revoked(u64),
    /// A target is gone.
    Gone(u64),
    /// A target was reset, or its RAM is elsewhere.
    Changed(u64),
    /// The introspector ends: nothing is pushed any more.
    Closed,
}

/// A queue that never blocks who puts something in.
#[derive(Debug)]
pub(super) struct Inbox {
    waiting: Mutex<VecDeque<Notice>>,
    /// Readable while something waits.
    wake: OwnedFd,
}

impl Inbox {
    pub(super) fn new() -> Result<Self, Errno> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { waiting: Mutex::default(), wake })
    }

    /// Puts a notice in. One that waits already says the same: a target that changes all the time
    /// makes no longer queue.
    pub(super) fn put(&self, notice: Notice) {
        let mut waiting = lock(&self.waiting);
        if !waiting.contains(&notice) {
            waiting.push_back(notice);
        }
        // It fails only where the counter is full, and then the thread wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// What waits, in its order.
    pub(super) fn take(&self) -> VecDeque<Notice> {
        let mut waiting = lock(&self.waiting);
        // Whether there was anything to read does not matter.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        std::mem::take(&mut waiting)
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Viewer for Inbox {
    fn revoke(&self, grant: u64) {
        self.put(Notice::Revoked(grant));
    }

    fn gone(&self, target: u64) {
        self.put(Notice::Gone(target));
    }

    fn changed(&self, target: u64) {
        self.put(Notice::Changed(target));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_changes_all_the_time_makes_no_longer_queue() {
        let inbox = Inbox::new().unwrap();
        for _ in 0..1000 {
            inbox.changed(1);
            inbox.changed(2);
        }
        inbox.revoke(1);
        let all = [Notice::Changed(1), Notice::Changed(2), Notice::Revoked(1)];
        assert_eq!(inbox.take(), all);
        assert!(inbox.take().is_empty());
    }
}

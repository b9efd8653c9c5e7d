// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an introspector's thread has to handle: pushes of the broker, events of QEMU, and views
//! that are to end.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvmmem_qemu::monitor::{Counts, MonitorEvent, Subscriber};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::view::View;
use crate::peer::Viewer;
use crate::sync::lock;

/// One thing to handle.
#[derive(Clone, Debug)]
pub(super) enum Notice {
    /// A grant was revoked.
    Revoked(u64),
    /// A target is gone.
    Gone(u64),
    /// A target was reset, or its RAM is elsewhere.
    Changed(u64),
    /// The VM was reset, as often by now.
    Reset(u64),
    /// QEMU has unplugged this device.
    Deleted(String),
    /// The QMP connection is lost, as often by now.
    Lost(u64),
    /// There is a new QMP connection.
    Found,
    /// The tool has closed its view, which is to be unplugged.
    Closed(Arc<View>),
    /// The view was not opened after all, and what is plugged in of it is to be unplugged.
    Undo(Arc<View>),
    /// The introspector ends, and all its views.
    End,
}

/// A queue that never blocks who puts something in. It is bounded by the views that there are, and
/// by what QEMU may report in one step.
#[derive(Debug)]
pub(super) struct Inbox {
    waiting: Mutex<VecDeque<Notice>>,
    /// Readable while something waits.
    wake: OwnedFd,
}

impl Notice {
    /// Whether one that waits says the same as another.
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Revoked(one), Self::Revoked(other))
            | (Self::Gone(one), Self::Gone(other))
            | (Self::Changed(one), Self::Changed(other)) => one == other,
            _ => false,
        }
    }
}

impl Inbox {
    pub(super) fn new() -> Result<Self, Errno> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { waiting: Mutex::default(), wake })
    }

    /// Puts a notice in. Where one that waits says the same, nothing is added: a target that
    /// changes all the time makes no longer queue. Of the notices with a count the last one counts.
    pub(super) fn put(&self, notice: Notice) {
        let mut waiting = lock(&self.waiting);
        if let (Some(Notice::Reset(_)), Notice::Reset(_)) = (waiting.back(), &notice) {
            waiting.pop_back();
        }
        if !waiting.iter().any(|other| other.covers(&notice)) {
            waiting.push_back(notice);
        }
        self.wake();
    }

    /// What waits, in its order.
    pub(super) fn take(&self) -> VecDeque<Notice> {
        let mut waiting = lock(&self.waiting);
        // Whether there was anything to read does not matter.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        std::mem::take(&mut waiting)
    }

    /// Has the thread look at what has changed.
    pub(super) fn wake(&self) {
        // It fails only where the counter is full, and then the thread wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
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

impl Subscriber for Inbox {
    fn notify(&self, event: &MonitorEvent, counts: Counts) {
        match event {
            MonitorEvent::Lost => self.put(Notice::Lost(counts.losses)),
            MonitorEvent::Found => self.put(Notice::Found),
            MonitorEvent::Qmp(event) => match (event.name.as_str(), &event.device) {
                ("RESET", _) => self.put(Notice::Reset(counts.resets)),
                // Parts of devices have no id.
                ("DEVICE_DELETED", Some(device)) => self.put(Notice::Deleted(device.clone())),
                _ => {}
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_the_same_makes_no_longer_queue() {
        let inbox = Inbox::new().unwrap();
        for count in 0..1000 {
            inbox.changed(1);
            inbox.changed(2);
            inbox.put(Notice::Reset(count));
        }
        inbox.revoke(1);
        let all: Vec<Notice> = inbox.take().into();
        assert!(
            matches!(
                all.as_slice(),
                [Notice::Changed(1), Notice::Changed(2), Notice::Reset(999), Notice::Revoked(1)]
            ),
            "{all:?}"
        );
        assert!(inbox.take().is_empty());
    }
}

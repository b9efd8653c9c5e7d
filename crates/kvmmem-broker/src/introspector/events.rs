// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that handles what the broker pushes to an introspector.

use std::sync::{Arc, Weak};

use rustix::event::{PollFd, PollFlags};

use super::Introspector;
use super::inbox::{Inbox, Notice};
use super::unplug::Cause;
use super::view::lock;
use crate::registry::Vm;

/// Starts the thread; it ends with the introspector.
pub(super) fn start(introspector: &Arc<Introspector>) -> std::io::Result<()> {
    let inbox = Arc::clone(&introspector.inbox);
    let introspector = Arc::downgrade(introspector);
    std::thread::Builder::new()
        .name("introspector".into())
        .spawn(move || run(&inbox, &introspector))?;
    Ok(())
}

fn run(inbox: &Inbox, introspector: &Weak<Introspector>) {
    loop {
        // Interrupted or not, what has come is looked for next.
        let _ = rustix::event::poll(&mut [PollFd::new(inbox, PollFlags::IN)], None);
        for notice in inbox.take() {
            let Some(introspector) = introspector.upgrade() else { return };
            match notice {
                Notice::Revoked(grant) => introspector.revoke(grant),
                Notice::Gone(target) => introspector.end_of(target),
                Notice::Changed(target) => introspector.changed(target),
                Notice::Closed => return,
            }
        }
    }
}

impl Introspector {
    fn revoke(&self, grant: u64) {
        lock(&self.state).unconfirmed.insert(grant);
        self.end(Cause::Revoked, |view| view.grant == grant);
        // Now, or when the last of them is gone.
        self.confirm_late(grant);
    }

    fn end_of(&self, target: u64) {
        self.end(Cause::Gone, |view| view.target == target);
    }

    fn changed(&self, target: u64) {
        let vm = self.link.target(target);
        let Some(layout) = vm.as_deref().and_then(Vm::ram).map(|ram| ram.layout()) else { return };
        for view in self.views().iter().filter(|view| view.target == target) {
            if view.is_unmoved(&layout) {
                view.refresh(layout.generation);
            }
        }
        self.end(Cause::Gone, |view| view.target == target && !view.is_unmoved(&layout));
    }
}

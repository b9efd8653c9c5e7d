// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Introspectors under a stock QEMU: what a VMM of ours does for its guest, the broker does here
//! over QMP.
//!
//! Towards the grants an [`Introspector`] is a VMM like any other: it has a [`Peer`], which is called
//! directly. Towards the guest a view is PCI devices ([`kvmmem_qemu::windows`]), which are plugged in
//! when a view is opened, on the thread of whoever opens it, and unplugged when it ends, by the
//! introspector's one thread.
//!
//! A guest can refuse to let go of a device, and then its QEMU keeps the target's memory mapped.
//! That cannot be helped from outside; so it is noticed, reported, and answered as the operator wants
//! ([`OnSilence`]). It costs that VM only: nothing that waits for it holds a lock that others need.
//!
//! A QEMU that the guest has broken into may answer late, never, or send events without end. Ending
//! a view, removing an introspector and killing its QEMU have deadlines that none of this puts off:
//! the thread waits for no answer.
//!
//! [`Peer`]: crate::peer::Peer

mod add;
mod end;
mod free_slots;
mod inbox;
mod link;
mod list;
mod open;
mod thread;
mod unplug;
mod view;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Instant;

use kvmmem_proto::message::OnSilence;
use kvmmem_qemu::monitor::Monitor;
use kvmmem_qemu::process::Process;

use crate::audit::Audit;
use crate::broker::Broker;
use add::Qemu;
use inbox::{Inbox, Notice};
use link::Link;
pub use list::Introspectors;
pub use open::{OpenError, Opened};
use view::{View, lock};

/// A VM under a stock QEMU that may look at others.
pub struct Introspector {
    broker: Weak<Broker>,
    link: Link,
    inbox: Arc<Inbox>,
    monitor: Arc<Monitor>,
    qemu: Qemu,
    process: Process,
    traits: Traits,
    state: Mutex<State>,
    /// Signalled when the thread has ended.
    ended: Condvar,
}

/// What does not change.
#[derive(Clone, Debug)]
struct Traits {
    /// The broker's number for the VM.
    vm: u64,
    name: String,
    cid: u32,
    on_silence: OnSilence,
    /// Whether its QEMU shows parts of files.
    has_offset: bool,
    /// What the names of its views begin with: no other broker has used it.
    session: String,
}

#[derive(Debug, Default)]
struct State {
    /// Those of which there is something in QEMU, or about to be.
    views: Vec<Arc<View>>,
    /// Revoked grants that the guest may still use.
    unconfirmed: BTreeSet<u64>,
    /// No view is opened any more.
    is_closed: bool,
    /// The thread has ended.
    is_ended: bool,
}

impl Introspector {
    /// Its vsock context id.
    pub fn cid(&self) -> u32 {
        self.traits.cid
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.traits.name
    }

    fn views(&self) -> Vec<Arc<View>> {
        lock(&self.state).views.clone()
    }

    fn audit(&self, write: impl FnOnce(&Audit)) {
        if let Some(broker) = self.broker.upgrade() {
            write(broker.audit());
        }
    }

    fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    /// Has the thread end all views and the registration, which takes a few seconds at most.
    fn close(&self) {
        self.inbox.put(Notice::End);
    }

    /// Waits until that is done; `false` where it is not in time.
    fn wait_ended(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let is_going = |state: &mut State| !state.is_ended;
        let waited = self.ended.wait_timeout_while(lock(&self.state), left, is_going);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_ended
    }

    /// Ends the registration: the thread has ended.
    fn end(&self) {
        if let Some(broker) = self.broker.upgrade() {
            broker.introspectors().remove(self.traits.vm);
        }
        self.link.close();
        let mut state = lock(&self.state);
        (state.is_closed, state.is_ended) = (true, true);
        self.ended.notify_all();
    }
}

impl fmt::Debug for Introspector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Introspector").field("traits", &self.traits).finish_non_exhaustive()
    }
}

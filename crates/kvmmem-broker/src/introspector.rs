// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Introspectors under a stock QEMU: what a VMM of ours does for its guest, the broker does here
//! over QMP.
//!
//! Towards the grants an [`Introspector`] is a VMM like any other: it has a [`Peer`], which is called
//! directly. Towards the guest a view is PCI devices: `ivshmem-plain`
//! over the files of the target's RAM, and over a descriptor page that says what is where
//! ([`kvmmem_abi::descriptor`]). They are plugged in when a view is opened, and unplugged when it
//! ends.
//!
//! [`Peer`]: crate::peer::Peer
//!
//! A guest can refuse to let go of a device, and then its QEMU keeps the target's memory mapped.
//! That cannot be helped from outside; so it is noticed, said, and answered as the operator wants
//! ([`OnSilence`]). It costs that VM only: each has its own threads, and nothing that waits for it
//! holds a lock that others need.
//!
//! A QEMU that the guest has broken into may answer late, never, or send events without end. Ending
//! a view, removing an introspector and killing its QEMU have deadlines that none of this puts off
//! (`Introspector::end`).

mod add;
mod ask;
mod descriptor;
mod events;
mod find;
mod free_slots;
mod inbox;
mod link;
mod list;
mod monitor;
mod open;
mod pci_slots;
mod plug;
mod process;
mod qmp_events;
mod unplug;
mod view;
mod window_layout;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use kvmmem_proto::message::OnSilence;

use crate::audit::Audit;
use crate::broker::Broker;
pub use ask::AskError;
pub use descriptor::Complaint;
pub use find::FindError;
use inbox::{Inbox, Notice};
use link::Link;
pub use list::Introspectors;
use monitor::Monitor;
pub use monitor::MonitorError;
pub use open::{OpenError, Opened};
use process::Process;
use view::{View, lock};
pub use window_layout::WindowLayoutError;

/// A VM under a stock QEMU that may look at others.
pub struct Introspector {
    /// For threads of its own.
    me: Weak<Self>,
    broker: Weak<Broker>,
    link: Link,
    inbox: Arc<Inbox>,
    monitor: Arc<Monitor>,
    process: Process,
    traits: Traits,
    state: Mutex<State>,
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
    /// What the ids of its devices begin with, behind [`plug::PREFIX`]: no other broker has used
    /// it.
    session: String,
}

#[derive(Debug, Default)]
struct State {
    /// Those of which there is something in QEMU, or about to be.
    views: Vec<Arc<View>>,
    /// Grants that were taken back and that the guest may still use.
    unconfirmed: BTreeSet<u64>,
    /// No view is opened any more.
    is_closed: bool,
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

    /// Ends all views and the registration, in a few seconds at most.
    fn close(&self) {
        lock(&self.state).is_closed = true;
        if !self.is_alive() {
            // Another process may have its socket now: send nothing there.
            self.monitor.stop();
        }
        self.end(unplug::Cause::Gone, |_| true);
        self.monitor.stop();
        self.link.close();
    }
}

impl Drop for Introspector {
    fn drop(&mut self) {
        self.monitor.stop();
        self.inbox.put(Notice::Closed);
    }
}

impl fmt::Debug for Introspector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Introspector").field("traits", &self.traits).finish_non_exhaustive()
    }
}

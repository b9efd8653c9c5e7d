// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One introspector: what its thread, the openers of its views and the broker share.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Instant;

use kvmmem_proto::message::OnSilence;
use kvmmem_qemu::monitor::Monitor;
use kvmmem_qemu::process::Process;

use super::inbox::{Inbox, Notice};
use super::link::Link;
use super::qemu::Qemu;
use super::retired::RetiredPorts;
use super::token_list::TokenViews;
use super::view::View;
use crate::audit::Audit;
use crate::broker::Broker;
use crate::sync::{lock, wait_while};
use crate::workers::Workers;

/// A VM under a stock QEMU that may look at others.
pub struct Introspector {
    pub(super) broker: Weak<Broker>,
    pub(super) link: Link,
    pub(super) inbox: Arc<Inbox>,
    pub(super) monitor: Arc<Monitor>,
    pub(super) qemu: Qemu,
    pub(super) process: Process,
    pub(super) traits: Traits,
    pub(super) state: Mutex<State>,
    pub(super) token_views: TokenViews,
    /// The threads that ask QEMU.
    pub(super) workers: Workers,
    /// Signalled when the thread has ended.
    pub(super) ended: Condvar,
}

/// What does not change.
#[derive(Clone, Debug)]
pub(super) struct Traits {
    /// The broker's number for the VM.
    pub(super) vm: u64,
    pub(super) name: String,
    pub(super) cid: u32,
    pub(super) trust: Trust,
    /// Whether its QEMU shows parts of files.
    pub(super) has_offset: bool,
    /// What the names of its views begin with: no other broker has used it.
    pub(super) session: String,
}

/// What the operator expects of an introspector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trust {
    /// What to do where its guest does not release memory.
    pub(super) on_silence: OnSilence,
    /// Whether each process that is root in it may see every view that it ever gets: its tools may
    /// do without the module then.
    pub(super) is_trusted: bool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Those of which there is something in QEMU, or about to be.
    pub(super) views: Vec<Arc<View>>,
    /// Revoked grants that the guest may still use.
    pub(super) unconfirmed: BTreeSet<u64>,
    /// Ports that no view is plugged into.
    pub(super) retired: RetiredPorts,
    /// No view is opened any more.
    pub(super) is_closed: bool,
    /// The thread has ended.
    pub(super) is_ended: bool,
}

impl Introspector {
    /// Its vsock context id.
    pub(crate) fn cid(&self) -> u32 {
        self.traits.cid
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.traits.name
    }

    pub(super) fn views(&self) -> Vec<Arc<View>> {
        lock(&self.state).views.clone()
    }

    pub(super) fn audit(&self, write: impl FnOnce(&Audit)) {
        if let Some(broker) = self.broker.upgrade() {
            write(broker.audit());
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    /// Has the thread end all views and the registration, which takes a few seconds at most.
    pub(super) fn close(&self) {
        self.inbox.put(Notice::End);
    }

    /// Waits until that is done; `false` where it is not in time.
    pub(super) fn wait_ended(&self, deadline: Instant) -> bool {
        wait_while(&self.ended, lock(&self.state), deadline, |state| !state.is_ended).is_ended
    }

    /// Ends the registration: the thread has ended.
    pub(super) fn end(&self) {
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

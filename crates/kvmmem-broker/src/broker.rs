// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker: the core under its lock, what goes with its numbers, and what is done for its
//! decisions.
//!
//! One lock guards all that is decided ([`Tables`]); it is never held over a system call. Under it
//! two others are taken, each for a moment: the queue of an outbox, and the one that has a VM's RAM
//! ([`Vm::ram`]). Locks that are held while it is taken serialize the work of one party: a peer's
//! `copying` and `sending`, an introspector's `attaching` and its tokens' list, the service's
//! `adding`. None of these is taken under it.

mod vms;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::KvmiPolicy;
use kvmmem_proto::scope::Scope;

use crate::audit::{Audit, AuditFile, Event};
use crate::buffers::Buffers;
use crate::core::Core;
use crate::core::limits::Limits;
use crate::core::quota::QuotaError;
use crate::peer::Peer;
use crate::registry::Vm;
use crate::state::State;
use crate::sync::checked::{Condvar, Mutex, MutexGuard, lock, wait_while};
use crate::tables::{Pending, Tables};

/// The core under its lock, with the handles that go with its numbers.
#[derive(Debug)]
pub struct Broker {
    limits: Limits,
    /// How far its clock is ahead of the system's, nanoseconds: tests let time pass.
    ahead: AtomicU64,
    tables: Mutex<Tables>,
    /// Signalled when a revocation may be done, and when a hook has ended. Goes with `tables`.
    confirmed: Condvar,
    buffers: Buffers,
    state: State,
    audit: Audit,
}

impl Broker {
    /// A broker that knows no VM.
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            ahead: AtomicU64::new(0),
            tables: Mutex::new(Tables::new(Core::new(&limits))),
            confirmed: Condvar::new(),
            buffers: Buffers::default(),
            state: State::default(),
            audit: Audit::default(),
        }
    }

    /// How many of what there may be.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The time by which tokens expire.
    pub(crate) fn now(&self) -> Instant {
        Instant::now() + Duration::from_nanos(self.ahead.load(Ordering::Relaxed))
    }

    /// Lets time pass for tokens and grants, for tests.
    pub fn pass_time(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.ahead.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// Tells the broker that it lasts as long as one command: what it says of a VM to tell its runs
    /// apart is then by the VMM's process alone, so that the next command's broker says the
    /// same.
    pub fn set_brief(&self) {
        self.state.set_brief();
    }

    pub(crate) fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// Signalled when a revocation may be done.
    pub(crate) fn confirmed(&self) -> &Condvar {
        &self.confirmed
    }

    pub(crate) fn tables(&self) -> MutexGuard<'_, Tables> {
        lock(&self.tables)
    }

    /// Has the core decide something, and performs what that demands.
    pub(crate) fn decide<T>(&self, operate: impl FnOnce(&mut Tables) -> T) -> T {
        let (result, pending) = self.decide_only(operate);
        self.perform(pending);
        result
    }

    /// Has the core decide something. The caller performs what that demands.
    pub(crate) fn decide_only<T>(&self, operate: impl FnOnce(&mut Tables) -> T) -> (T, Pending) {
        let mut tables = self.tables();
        let result = operate(&mut tables);
        let pending = tables.settle();
        (result, pending)
    }

    pub(crate) fn perform(&self, pending: Pending) {
        if pending.is_confirmed {
            self.confirmed.notify_all();
        }
        for peer in pending.peers {
            peer.flush();
        }
        for (view, peer, reason) in pending.closed {
            self.audit.write(Event::Detached { view: &view, peer: peer.as_deref(), reason });
        }
    }

    /// Also writes the audit log to the file at `path` from now on, made with mode 0600 if it is
    /// not there: one JSON object a line.
    ///
    /// # Errors
    /// Where the file cannot be opened, or there is no thread left to write it.
    pub fn write_audit_to(&self, path: &Path) -> io::Result<()> {
        self.audit.write_to(AuditFile::open(path)?)
    }

    /// The audit log.
    pub(crate) fn audit(&self) -> &Audit {
        &self.audit
    }

    /// Sets what tokens allow that KVMI makes for targets that have no policy of their own.
    pub fn set_kvmi_tokens(&self, policy: KvmiPolicy) {
        self.tables().core.policies.set_default(policy);
    }

    /// How many grants and views there are.
    pub fn grant_count(&self) -> (usize, usize) {
        self.tables().core.grants.len()
    }

    /// Records a new connection.
    pub(crate) fn join(&self, peer: &Arc<Peer>) {
        let mut tables = self.tables();
        tables.core.peer_joined(peer.number(), peer.credentials());
        tables.peers.insert(peer.number(), Arc::clone(peer));
    }

    /// Ends a connection: its VM, its views and its channels end.
    pub(crate) fn leave(&self, peer: &Peer, vm: Option<&Vm>) {
        // It is closed last: what ends with the connection does not wait for that.
        let ram = vm.and_then(Vm::ram);
        if let Some(vm) = vm {
            self.retire(vm);
        }
        peer.end_channels();
        let now = self.now();
        self.decide(|tables| tables.core.peer_lost(now, peer.number()));
        let left = self.tables().peers.remove(&peer.number());
        drop((left, ram));
    }

    /// The target of a view, and what the view reaches of it; `None` once the view has ended: its
    /// grant was revoked, or its target is gone.
    pub(crate) fn reached(&self, peer: &Peer, view: u64) -> Option<(Arc<Vm>, Scope)> {
        let tables = self.tables();
        let (target, scope) = tables.core.grants.reach(view, peer.number())?;
        Some((Arc::clone(tables.vms.get(&target)?), scope))
    }

    /// How many hooks there are.
    pub fn hook_count(&self) -> usize {
        self.tables().core.hooks.count()
    }

    /// Waits until no hook is left; returns how many are at the deadline.
    pub(crate) fn wait_for_hooks(&self, deadline: Instant) -> usize {
        let are_there = |tables: &mut Tables| tables.core.hooks.count() > 0;
        wait_while(&self.confirmed, self.tables(), deadline, are_there).core.hooks.count()
    }

    /// Counts a hook of a user.
    pub(crate) fn take_hook(&self, who: Credentials) -> Result<(), QuotaError> {
        self.tables().core.hooks.take(who)
    }

    /// Gives a user's hook back.
    pub(crate) fn give_back_hook(&self, uid: u32) {
        self.tables().core.hooks.give_back(uid);
        self.confirmed.notify_all();
    }
}

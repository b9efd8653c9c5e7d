// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The audit log: who got, used and lost what, as `tracing` events of target [`TARGET`] and as
//! lines of a file.
//!
//! What a guest, a tool or a user can cause at will is limited to so many lines a second for each
//! kind of event and each party (`limits`); the field `suppressed` of the next line tells how
//! many were left out. Tokens are never written.

mod event;
mod file;
pub(crate) mod limits;
mod movable;
mod record;

use std::sync::{PoisonError, RwLock};
use std::time::Instant;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::message::{Caller, Change, KvmiPolicy, OnSilence, Revoked};
use kvmmem_proto::scope::Scope;

use crate::core::grants::View;
use crate::peer::Peer;
use crate::registry::Vm;
use event::Event;
use file::Lines;
use limits::{Parties, Party};
pub(crate) use movable::AuditFile;
use record::Record;
pub use record::TARGET;

/// The audit log.
#[derive(Debug, Default)]
pub(crate) struct Audit {
    file: RwLock<Option<Lines>>,
    parties: Parties,
}

impl Audit {
    /// Also writes lines to `file` from now on: one JSON object each, with `time` in UTC by RFC
    /// 3339, `event` and what belongs to it. If that fails, it is said once in the log, and the
    /// lines go on being tried.
    ///
    /// # Errors
    /// Where there is no thread left to write them.
    pub(crate) fn write_to(&self, file: AuditFile) -> std::io::Result<()> {
        let lines = Lines::new(file)?;
        *self.file.write().unwrap_or_else(PoisonError::into_inner) = Some(lines);
        Ok(())
    }

    /// A VM was registered.
    pub(crate) fn registered(&self, vm: &Vm) {
        let registration = vm.registration();
        let record = Record {
            cid: registration.cid,
            introspectable: Some(registration.introspectable),
            introspector: Some(registration.introspector),
            ..Record::new(Event::Registered).of(vm).on_host(vm.peer().credentials())
        };
        self.write(Party::of(vm.peer()), record);
    }

    /// An operator had the broker attach a VM that runs.
    pub(crate) fn added(&self, vm: &Vm, peer: Credentials) {
        self.write(Party::User(peer.uid), Record::new(Event::Added).of(vm).on_host(peer));
        self.registered(vm);
    }

    /// An operator had the broker make an introspector of a VM that runs.
    pub(crate) fn added_introspector(&self, vm: &Vm, on_silence: OnSilence, peer: Credentials) {
        let policy = Some(on_silence.to_string());
        let record =
            Record { policy, ..Record::new(Event::AddedIntrospector).of(vm).on_host(peer) };
        self.write(Party::User(peer.uid), record);
    }

    /// An introspector's guest did not let go of a view's memory in time.
    pub(crate) fn silent(
        &self,
        vm: &Vm,
        view: u64,
        grant: u64,
        on_silence: OnSilence,
        reason: &str,
    ) {
        let record = Record {
            view: Some(view),
            grant: Some(grant),
            policy: Some(on_silence.to_string()),
            reason: Some(reason),
            ..Record::new(Event::Silent).by(vm)
        };
        self.write(Party::of(vm.peer()), record);
    }

    /// A VM's VMM went away.
    pub(crate) fn gone(&self, vm: &Vm) {
        self.write(Party::of(vm.peer()), Record::new(Event::Gone).of(vm));
    }

    /// A VM goes on in another process than `former`.
    pub(crate) fn taken_over(&self, vm: &Vm, former: Credentials) {
        let reason = format!("live update: it was process {}", former.pid);
        let record = Record::new(Event::TakenOver).of(vm).on_host(vm.peer().credentials());
        self.write(Party::of(vm.peer()), Record { reason: Some(&reason), ..record });
    }

    /// A request was refused.
    pub(crate) fn refused(&self, peer: &Peer, by: Option<&Vm>, reason: &str) {
        let record = Record {
            reason: Some(reason),
            ..Record::new(Event::Refused).on_host(peer.credentials())
        };
        match by {
            Some(by) => self.write(Party::of(peer), record.by(by)),
            None => self.write(Party::User(peer.credentials().uid), record),
        }
    }

    /// A hook was made or undone.
    pub(crate) fn hooked(&self, vm: &Vm, endpoint: &Endpoint, on: bool, peer: Credentials) {
        let record =
            Record { on: Some(on), ..Record::new(Event::Hook).of(vm).at(endpoint).on_host(peer) };
        self.write(Party::User(peer.uid), record);
    }

    /// A hook has ended by itself.
    pub(crate) fn unhooked(&self, vm: &Vm, endpoint: &Endpoint, reason: &str) {
        let record = Record { on: Some(false), reason: Some(reason), ..Record::new(Event::Hook) };
        self.write(Party::of(vm.peer()), record.of(vm).at(endpoint));
    }

    /// A tool was connected to a target.
    pub(crate) fn connected(&self, vm: &Vm, endpoint: &Endpoint) {
        self.write(Party::of(vm.peer()), Record::new(Event::Connected).of(vm).at(endpoint));
    }

    /// A tool's connection ended.
    pub(crate) fn disconnected(&self, vm: &Vm, endpoint: &Endpoint, reason: &str) {
        let record =
            Record { reason: Some(reason), ..Record::new(Event::Disconnected).of(vm).at(endpoint) };
        self.write(Party::of(vm.peer()), record);
    }

    /// A tool got a token, which only `holder` may use, or anybody where there is none.
    pub(crate) fn minted(
        &self,
        vm: &Vm,
        endpoint: &Endpoint,
        grant: u64,
        scope: &Scope,
        holder: Option<&Vm>,
    ) {
        let record = Record {
            grant: Some(grant),
            holder: holder.map(|holder| holder.registration().uuid),
            ..Record::new(Event::Minted).of(vm).at(endpoint).allowing(scope)
        };
        self.write(Party::of(vm.peer()), record);
    }

    /// A tool got no token.
    pub(crate) fn not_minted(&self, vm: &Vm, endpoint: &Endpoint, reason: &str) {
        let record =
            Record { reason: Some(reason), ..Record::new(Event::NotMinted).of(vm).at(endpoint) };
        self.write(Party::of(vm.peer()), record);
    }

    /// An operator got a token.
    pub(crate) fn granted(
        &self,
        vm: &Vm,
        grant: u64,
        terms: &kvmmem_proto::message::GrantRequest,
        scope: &Scope,
        peer: Credentials,
    ) {
        let record = Record {
            grant: Some(grant),
            uses: Some(terms.uses),
            ttl_ms: Some(terms.ttl_ms),
            holder: terms.holder,
            label: terms.label.as_deref(),
            ..Record::new(Event::Granted).of(vm).allowing(scope).on_host(peer)
        };
        self.write(Party::User(peer.uid), record);
    }

    /// A VM used a token for a page.
    pub(crate) fn used(&self, grant: u64, target: &Vm, by: &Vm) {
        let record = Record { grant: Some(grant), ..Record::new(Event::Used).of(target).by(by) };
        self.write(Party::of(by.peer()), record);
    }

    /// A token was used for a view.
    pub(crate) fn attached(
        &self,
        view: u64,
        opened: (u64, &Scope),
        target: &Vm,
        by: (&Peer, Option<&Vm>),
        caller: &Caller,
    ) {
        let (peer, vm) = by;
        let record = Record {
            grant: Some(opened.0),
            view: Some(view),
            ..Record::new(Event::Attached)
                .of(target)
                .allowing(opened.1)
                .on_host(peer.credentials())
                .asked_by(caller)
        };
        match vm {
            Some(vm) => self.write(Party::of(peer), record.by(vm)),
            None => {
                let (uid, grant) = (peer.credentials().uid, opened.0);
                self.write(Party::Holder { uid, grant }, record.by_host());
            }
        }
    }

    /// A view has ended.
    pub(crate) fn detached(&self, view: &View, peer: Option<&Peer>, reason: &str) {
        let record = Record {
            vm: Some(view.target),
            grant: Some(view.grant),
            view: Some(view.id),
            by: Some(&view.by),
            by_uuid: view.by_uuid,
            seeks: Some(view.counters.seeks),
            refused_writes: Some(view.counters.refused_writes),
            reason: Some(reason),
            ..Record::new(Event::Detached).asked_by(&view.caller)
        };
        let party = match peer.filter(|_| view.by_uuid.is_some()) {
            Some(peer) => Party::of(peer),
            // What a guest says of its processes must not choose whose limit it is.
            None if view.by_uuid.is_some() => Party::Holder { uid: u32::MAX, grant: view.grant },
            None => Party::Holder { uid: view.caller.uid, grant: view.grant },
        };
        self.write(party, record);
    }

    /// A grant was taken back.
    pub(crate) fn revoked(&self, grant: u64, target: u64, outcome: &Revoked, peer: Credentials) {
        let record = Record {
            vm: Some(target),
            grant: Some(grant),
            views: Some(outcome.views),
            unconfirmed: Some(outcome.unconfirmed),
            micros: Some(outcome.micros),
            ..Record::new(Event::Revoked).on_host(peer)
        };
        self.write(Party::User(peer.uid), record);
    }

    /// What KVMI's tokens allow was set for a target.
    pub(crate) fn policy(&self, uuid: uuid::Uuid, policy: KvmiPolicy, peer: Credentials) {
        let policy = Some(policy.to_string());
        let record =
            Record { uuid: Some(uuid), policy, ..Record::new(Event::Policy).on_host(peer) };
        self.write(Party::User(peer.uid), record);
    }

    /// An operator got the registers of a target's vCPUs.
    pub(crate) fn registers(&self, vm: &Vm, peer: Credentials) {
        self.write(Party::User(peer.uid), Record::new(Event::Registers).of(vm).on_host(peer));
    }

    /// An operator had a target stopped.
    pub(crate) fn paused(&self, vm: &Vm, was_running: bool, peer: Credentials) {
        let reason = (!was_running).then_some("it did not run before");
        let record = Record { reason, ..Record::new(Event::Paused).of(vm).on_host(peer) };
        self.write(Party::User(peer.uid), record);
    }

    /// An operator's pause of a target has ended.
    pub(crate) fn resumed(&self, vm: &Vm, reason: &str, peer: Credentials) {
        let record =
            Record { reason: Some(reason), ..Record::new(Event::Resumed).of(vm).on_host(peer) };
        self.write(Party::User(peer.uid), record);
    }

    /// A VM was reset, or its RAM is elsewhere.
    pub(crate) fn ram_changed(&self, vm: &Vm, change: Change) {
        let reason = match change {
            Change::Reset => "reset",
            Change::Resized => "resized",
        };
        let record = Record { reason: Some(reason), ..Record::new(Event::RamChanged).of(vm) };
        self.write(Party::of(vm.peer()), record);
    }

    fn write(&self, party: Party<'_>, mut record: Record<'_>) {
        let Some(suppressed) = self.parties.allow(party, record.event, Instant::now()) else {
            return;
        };
        record.suppressed = suppressed;
        record.trace();
        if let Some(file) = &*self.file.read().unwrap_or_else(PoisonError::into_inner) {
            file.write(&record);
        }
    }
}

impl<'a> Party<'a> {
    /// The VM that a peer has registered.
    fn of(peer: &'a Peer) -> Self {
        Self::Vm(peer.limits(), peer.credentials().uid)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The events of the audit log.

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::message::{Caller, Change, GrantRequest, KvmiPolicy, OnSilence, RevokeReport};
use kvmmem_proto::scope::Scope;
use uuid::Uuid;

use super::kind::Kind;
use super::limits::Party;
use super::record::Record;
use crate::core::grants::{Access, View};
use crate::peer::Peer;
use crate::registry::Vm;

/// What has happened: to which VM, by whom.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event<'a> {
    Registered(&'a Vm),
    /// An operator has added a VM that runs.
    Added {
        vm: &'a Vm,
        by: Credentials,
    },
    /// An operator has made an introspector of a VM that runs.
    AddedIntrospector {
        vm: &'a Vm,
        on_silence: OnSilence,
        is_trusted: bool,
        by: Credentials,
    },
    /// An introspector's guest did not release a view's memory in time.
    Silent {
        vm: &'a Vm,
        view: u64,
        grant: u64,
        on_silence: OnSilence,
        reason: &'a str,
    },
    /// No view is plugged into a PCI bus before the introspector is reset: a tool without the
    /// module has not acknowledged the end of its view there.
    PortRetired {
        vm: &'a Vm,
        view: u64,
        grant: u64,
        bus: &'a str,
    },
    /// A VM's VMM has exited.
    Gone(&'a Vm),
    /// A VM continues in another process than `former`.
    TakenOver {
        vm: &'a Vm,
        former: Credentials,
    },
    /// A request of a peer was refused.
    Refused {
        peer: &'a Peer,
        vm: Option<&'a Vm>,
        reason: &'a str,
    },
    /// An operator has made or undone a hook.
    Hook {
        vm: &'a Vm,
        endpoint: &'a Endpoint,
        on: bool,
        by: Credentials,
    },
    /// A hook has ended by itself.
    HookEnded {
        vm: &'a Vm,
        endpoint: &'a Endpoint,
        reason: &'a str,
    },
    /// A tool was connected to a target.
    Connected {
        vm: &'a Vm,
        endpoint: &'a Endpoint,
    },
    Disconnected {
        vm: &'a Vm,
        endpoint: &'a Endpoint,
        reason: &'a str,
    },
    /// A tool got a token, which only `holder` may use where there is one.
    NewToken {
        vm: &'a Vm,
        endpoint: &'a Endpoint,
        grant: u64,
        scope: &'a Scope,
        holder: Option<&'a Vm>,
    },
    NotMinted {
        vm: &'a Vm,
        endpoint: &'a Endpoint,
        reason: &'a str,
    },
    /// An operator got a token.
    Granted {
        vm: &'a Vm,
        opened: &'a Access,
        request: &'a GrantRequest,
        by: Credentials,
    },
    /// A VM has used a token for a page.
    Used {
        grant: u64,
        target: &'a Vm,
        by: &'a Vm,
    },
    /// A token was used for a view, by a VM or a process of the host.
    Attached {
        view: u64,
        opened: &'a Access,
        target: &'a Vm,
        peer: &'a Peer,
        by: Option<&'a Vm>,
        caller: &'a Caller,
    },
    /// A view has ended.
    Detached {
        view: &'a View,
        peer: Option<&'a Peer>,
        reason: &'a str,
    },
    Revoked {
        grant: u64,
        target: u64,
        outcome: &'a RevokeReport,
        by: Credentials,
    },
    /// The policy for tokens issued over KVMI was set.
    Policy {
        uuid: Uuid,
        policy: KvmiPolicy,
        by: Credentials,
    },
    /// An operator got the registers of a target's vCPUs.
    Registers {
        vm: &'a Vm,
        by: Credentials,
    },
    Paused {
        vm: &'a Vm,
        was_running: bool,
        by: Credentials,
    },
    Resumed {
        vm: &'a Vm,
        reason: &'a str,
        by: Credentials,
    },
    /// A VM was reset, or its RAM is elsewhere.
    RamChanged {
        vm: &'a Vm,
        change: Change,
    },
}

impl<'a> Event<'a> {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Registered(_) => Kind::Registered,
            Self::Added { .. } => Kind::Added,
            Self::AddedIntrospector { .. } => Kind::AddedIntrospector,
            Self::Silent { .. } => Kind::Silent,
            Self::PortRetired { .. } => Kind::PortRetired,
            Self::Gone(_) => Kind::Gone,
            Self::TakenOver { .. } => Kind::TakenOver,
            Self::Refused { .. } => Kind::Refused,
            Self::Hook { .. } | Self::HookEnded { .. } => Kind::Hook,
            Self::Connected { .. } => Kind::Connected,
            Self::Disconnected { .. } => Kind::Disconnected,
            Self::NewToken { .. } => Kind::NewToken,
            Self::NotMinted { .. } => Kind::NotMinted,
            Self::Granted { .. } => Kind::Granted,
            Self::Used { .. } => Kind::Used,
            Self::Attached { .. } => Kind::Attached,
            Self::Detached { .. } => Kind::Detached,
            Self::Revoked { .. } => Kind::Revoked,
            Self::Policy { .. } => Kind::Policy,
            Self::Registers { .. } => Kind::Registers,
            Self::Paused { .. } => Kind::Paused,
            Self::Resumed { .. } => Kind::Resumed,
            Self::RamChanged { .. } => Kind::RamChanged,
        }
    }

    /// The party that has caused it.
    pub(super) fn party(&self) -> Party<'a> {
        match *self {
            Self::Registered(vm)
            | Self::Gone(vm)
            | Self::Silent { vm, .. }
            | Self::PortRetired { vm, .. }
            | Self::TakenOver { vm, .. }
            | Self::HookEnded { vm, .. }
            | Self::Connected { vm, .. }
            | Self::Disconnected { vm, .. }
            | Self::NewToken { vm, .. }
            | Self::NotMinted { vm, .. }
            | Self::RamChanged { vm, .. }
            | Self::Used { by: vm, .. } => of_peer(vm.peer()),
            Self::Added { by, .. }
            | Self::AddedIntrospector { by, .. }
            | Self::Hook { by, .. }
            | Self::Granted { by, .. }
            | Self::Revoked { by, .. }
            | Self::Policy { by, .. }
            | Self::Registers { by, .. }
            | Self::Paused { by, .. }
            | Self::Resumed { by, .. } => Party::User(by.uid),
            Self::Refused { peer, vm: Some(_), .. } | Self::Attached { peer, by: Some(_), .. } => {
                of_peer(peer)
            }
            Self::Refused { peer, vm: None, .. } => Party::User(peer.credentials().uid),
            Self::Attached { peer, by: None, opened, .. } => {
                Party::Holder { uid: peer.credentials().uid, grant: opened.grant }
            }
            Self::Detached { view, peer, .. } => match (view.by_uuid, peer) {
                (Some(_), Some(peer)) => of_peer(peer),
                // What a guest says of its processes must not choose whose limit it is.
                (Some(_), None) => Party::Holder { uid: u32::MAX, grant: view.grant },
                (None, _) => Party::Holder { uid: view.caller.uid, grant: view.grant },
            },
        }
    }

    /// Writes into a new record what belongs to the event. The record is large: it is filled in
    /// place, as thousands of threads keep the deepest stack that they have ever had.
    pub(super) fn fill(&self, record: &mut Record<'a>) {
        record.event = self.kind().name();
        match *self {
            Self::Registered(vm) => {
                let identity = vm.identity();
                record.of(vm).on_host(vm.peer().credentials());
                record.cid = identity.cid;
                record.introspectable = Some(identity.introspectable);
                record.introspector = Some(identity.introspector);
            }
            Self::Added { vm, by } | Self::Registers { vm, by } => {
                record.of(vm).on_host(by);
            }
            Self::AddedIntrospector { vm, on_silence, is_trusted, by } => {
                let trusted = if is_trusted { ", trusted" } else { "" };
                record.of(vm).on_host(by);
                record.policy = Some(format!("{on_silence}{trusted}"));
            }
            Self::Silent { vm, view, grant, on_silence, reason } => {
                record.by(vm).because(reason);
                record.view = Some(view);
                record.grant = Some(grant);
                record.policy = Some(on_silence.to_string());
            }
            Self::PortRetired { vm, view, grant, bus } => {
                record.by(vm).because(bus);
                record.view = Some(view);
                record.grant = Some(grant);
            }
            Self::Gone(vm) => {
                record.of(vm);
            }
            Self::TakenOver { vm, former } => {
                let reason = format!("live update: it was process {}", former.pid);
                record.of(vm).on_host(vm.peer().credentials()).because(reason);
            }
            Self::Refused { peer, vm, reason } => {
                if let Some(vm) = vm {
                    record.by(vm);
                }
                record.on_host(peer.credentials()).because(reason);
            }
            Self::Hook { vm, endpoint, on, by } => {
                record.of(vm).at(endpoint).on_host(by);
                record.on = Some(on);
            }
            Self::HookEnded { vm, endpoint, reason } => {
                record.of(vm).at(endpoint).because(reason);
                record.on = Some(false);
            }
            Self::Connected { vm, endpoint } => {
                record.of(vm).at(endpoint);
            }
            Self::Disconnected { vm, endpoint, reason }
            | Self::NotMinted { vm, endpoint, reason } => {
                record.of(vm).at(endpoint).because(reason);
            }
            Self::NewToken { vm, endpoint, grant, scope, holder } => {
                record.of(vm).at(endpoint).allowing(scope);
                record.grant = Some(grant);
                record.holder = holder.map(|holder| holder.identity().uuid);
            }
            Self::Granted { vm, opened, request, by } => {
                record.of(vm).allowing(&opened.scope).on_host(by);
                record.grant = Some(opened.grant);
                record.uses = Some(request.uses);
                record.ttl_ms = Some(request.ttl_ms);
                record.holder = request.holder;
                record.label = request.label.as_deref();
            }
            Self::Used { grant, target, by } => {
                record.of(target).by(by);
                record.grant = Some(grant);
            }
            Self::Attached { view, opened, target, peer, by, caller } => {
                record.of(target).allowing(&opened.scope).asked_by(caller);
                record.on_host(peer.credentials());
                record.grant = Some(opened.grant);
                record.view = Some(view);
                match by {
                    Some(vm) => record.by(vm),
                    None => record.by_host(),
                };
            }
            Self::Detached { view, reason, .. } => {
                record.asked_by(&view.caller).because(reason);
                record.vm = Some(view.target);
                record.grant = Some(view.grant);
                record.view = Some(view.id);
                record.by = Some(&view.by);
                record.by_uuid = view.by_uuid;
                record.seeks = Some(view.counters.seeks);
                record.refused_writes = Some(view.counters.refused_writes);
            }
            Self::Revoked { grant, target, outcome, by } => {
                record.on_host(by);
                record.vm = Some(target);
                record.grant = Some(grant);
                record.views = Some(outcome.views);
                record.unconfirmed = Some(outcome.unconfirmed);
                record.micros = Some(outcome.micros);
            }
            Self::Policy { uuid, policy, by } => {
                record.on_host(by);
                record.uuid = Some(uuid);
                record.policy = Some(policy.to_string());
            }
            Self::Paused { vm, was_running, by } => {
                record.of(vm).on_host(by);
                if !was_running {
                    record.because("it did not run before");
                }
            }
            Self::Resumed { vm, reason, by } => {
                record.of(vm).on_host(by).because(reason);
            }
            Self::RamChanged { vm, change } => {
                record.of(vm).because(match change {
                    Change::Reset => "reset",
                    Change::Resized => "resized",
                });
            }
        }
    }
}

/// The VM that a peer has registered.
fn of_peer(peer: &Peer) -> Party<'_> {
    Party::Vm(peer.limits(), peer.credentials().uid)
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One line of the audit log.

use std::borrow::Cow;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::message::Caller;
use kvmmem_proto::scope::{Scope, Span};
use serde::Serialize;
use uuid::Uuid;

use crate::registry::Vm;

/// The `target` of every event of the audit log.
pub const TARGET: &str = "audit";

/// What is written of an event. What is `None` does not belong to it.
#[derive(Default, Serialize)]
pub(super) struct Record<'a> {
    pub(super) event: &'static str,
    /// Lines of this kind that were left out before this one.
    pub(super) suppressed: u64,
    /// Number of the VM that it happened to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) vm: Option<u64>,
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<&'a str>,
    /// Its UUID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) uuid: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) introspectable: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) introspector: Option<bool>,
    /// Where the tool listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) endpoint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) on: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) grant: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) view: Option<u64>,
    /// Name of the introspector that did it, or `host`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) by: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) by_uuid: Option<Uuid>,
    /// The process that asked, as the guest's kernel says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) caller_pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) caller_uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) caller_comm: Option<&'a str>,
    /// The process at the other end of the broker's socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rights: Option<String>,
    /// Where, if not in all RAM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) spans: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) uses: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ttl_ms: Option<u64>,
    /// The only introspector that may use the token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) holder: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) label: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) policy: Option<String>,
    /// How many views have ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) views: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) unconfirmed: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) micros: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seeks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) refused_writes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<Cow<'a, str>>,
}

impl<'a> Record<'a> {
    /// What happened to this VM.
    pub(super) fn of(&mut self, vm: &'a Vm) -> &mut Self {
        let identity = vm.identity();
        self.vm = Some(vm.id());
        self.name = Some(&identity.name);
        self.uuid = Some(identity.uuid);
        self
    }

    /// What this introspector did.
    pub(super) fn by(&mut self, vm: &'a Vm) -> &mut Self {
        let identity = vm.identity();
        self.by = Some(&identity.name);
        self.by_uuid = Some(identity.uuid);
        self
    }

    /// What a process of the host did.
    pub(super) fn by_host(&mut self) -> &mut Self {
        self.by = Some("host");
        self
    }

    pub(super) fn at(&mut self, endpoint: &Endpoint) -> &mut Self {
        self.endpoint = Some(endpoint.to_string());
        self
    }

    pub(super) fn on_host(&mut self, peer: Credentials) -> &mut Self {
        self.pid = Some(peer.pid);
        self.uid = Some(peer.uid);
        self
    }

    pub(super) fn asked_by(&mut self, caller: &'a Caller) -> &mut Self {
        self.caller_pid = Some(caller.pid);
        self.caller_uid = Some(caller.uid);
        self.caller_comm = Some(&caller.comm);
        self
    }

    pub(super) fn because(&mut self, reason: impl Into<Cow<'a, str>>) -> &mut Self {
        self.reason = Some(reason.into());
        self
    }

    pub(super) fn allowing(&mut self, scope: &Scope) -> &mut Self {
        let texts = |spans: &Vec<Span>| spans.iter().map(ToString::to_string).collect();
        self.spans = scope.spans.as_ref().map(texts);
        self.rights = Some(scope.rights.to_string());
        self
    }

    /// Writes the record to the service's log.
    pub(super) fn trace(&self) {
        tracing::info!(
            target: TARGET,
            event = self.event,
            suppressed = self.suppressed,
            vm = self.vm,
            name = self.name,
            uuid = self.uuid.map(tracing::field::display),
            cid = self.cid,
            introspectable = self.introspectable,
            introspector = self.introspector,
            endpoint = self.endpoint.as_deref(),
            on = self.on,
            grant = self.grant,
            view = self.view,
            by = self.by,
            by_uuid = self.by_uuid.map(tracing::field::display),
            caller_pid = self.caller_pid,
            caller_uid = self.caller_uid,
            caller_comm = self.caller_comm,
            pid = self.pid,
            uid = self.uid,
            rights = self.rights.as_deref(),
            spans = self.spans.as_ref().map(tracing::field::debug),
            uses = self.uses,
            ttl_ms = self.ttl_ms,
            holder = self.holder.map(tracing::field::display),
            label = self.label,
            policy = self.policy.as_deref(),
            views = self.views,
            unconfirmed = self.unconfirmed,
            micros = self.micros,
            seeks = self.seeks,
            refused_writes = self.refused_writes,
            reason = self.reason.as_deref(),
        );
    }
}

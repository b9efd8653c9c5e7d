// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The core's state, and what changes it besides the calls of peers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::Refusal;

use super::call_error::CallError;
use super::effect::{Effect, Push};
use super::grants::{Grants, View};
use super::layout::Layout;
use super::limits::Limits;
use super::peers::{Peer, Peers};
use super::policy::Policies;
use super::quota::Quota;
use super::revocation::{Revocation, Revocations};
use super::vms::{NewVm, RegisterError, Vms};

/// The broker's state, without files, sockets and threads.
#[derive(Clone, Debug)]
pub(crate) struct Core {
    pub(crate) vms: Vms,
    pub(super) peers: Peers,
    pub(crate) grants: Grants,
    pub(crate) policies: Policies,
    pub(super) revocations: Revocations,
    /// Hooks of all targets.
    pub(crate) hooks: Quota,
    /// Channels for copies, of all views.
    pub(crate) channels: Quota,
    /// How long a token lives that KVMI makes.
    pub(super) kvmi_lifetime: Duration,
    pub(super) effects: Vec<Effect>,
}

impl Core {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            vms: Vms::new(limits.vms),
            peers: Peers::new(),
            grants: Grants::new(limits.grants),
            policies: Policies::new(limits.policies),
            revocations: Revocations::default(),
            hooks: Quota::new(limits.hooks),
            channels: Quota::new(limits.channels),
            kvmi_lifetime: limits.kvmi_lifetime,
            effects: Vec::new(),
        }
    }

    /// The effects of what was decided since the last call, in order.
    pub(crate) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    pub(crate) fn peer_joined(&mut self, peer: u64, credentials: Credentials) {
        self.peers.insert(peer, Peer::new(credentials));
    }

    /// Removes what a peer held whose connection has ended.
    pub(crate) fn peer_lost(&mut self, now: Instant, peer: u64) {
        self.peers.remove(&peer);
        self.revocations.peer_lost(peer);
        let closed = self.grants.forget_peer(now, peer);
        self.closed(closed, "the connection ended");
        self.effects.push(Effect::Confirmed);
    }

    /// Registers a VM for its VMM's connection; returns its number.
    pub(crate) fn register(&mut self, new: NewVm) -> Result<u64, RegisterError> {
        let peer = new.peer;
        let id = self.vms.insert(new)?;
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.vm = Some(id);
        }
        Ok(id)
    }

    /// Removes a VM, its grants and views. The peers that know it are told. A revocation still
    /// waits: the target's end unmaps nothing in its peers. Returns whether it was there.
    pub(crate) fn vm_gone(&mut self, vm: u64) -> bool {
        let is_there = self.vms.remove(vm).is_some();
        let closed = self.grants.forget_target(vm);
        self.closed(closed, "the target is gone");
        for (&peer, known) in &mut self.peers {
            if known.forget(vm) {
                self.effects.push(Effect::Push { peer, push: Push::Gone { target: vm } });
            }
        }
        is_there
    }

    /// A VM goes on in another process.
    pub(crate) fn vm_moved(&mut self, vm: u64, vmm: Credentials) {
        if let Some(vm) = self.vms.get_mut(vm) {
            vm.vmm = vmm;
        }
    }

    /// Records where a VM's RAM is now. The peers that know it are told.
    pub(crate) fn ram_changed(&mut self, vm: u64, layout: &Arc<Layout>) {
        let Some(its) = self.vms.get_mut(vm) else { return };
        its.layout = Some(Arc::clone(layout));
        for (&peer, _) in self.peers.iter().filter(|(_, peer)| peer.knows(vm)) {
            let push = Push::Changed { target: vm, layout: Arc::clone(layout) };
            self.effects.push(Effect::Push { peer, push });
        }
    }

    /// The peer does not know a target: it could not be sent.
    pub(crate) fn not_introduced(&mut self, peer: u64, target: u64) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.forget(target);
        }
    }

    /// Revokes a grant: its token opens nothing any more, and its peers are told. Each of them
    /// confirms with [`Self::confirm`].
    pub(crate) fn revoke(&mut self, now: Instant, grant: u64) -> Result<Revocation, CallError> {
        let affected = self.grants.revoke(now, grant).ok_or_else(|| unknown_grant(grant))?;
        let revocation = self.revocations.begin(grant, affected);
        for &peer in &revocation.peers {
            self.effects.push(Effect::Push { peer, push: Push::Revoke { grant } });
        }
        Ok(revocation)
    }

    /// Whether a revocation waits for no peer any more.
    pub(crate) fn is_revoked(&self, number: u64) -> bool {
        self.revocations.is_done(number)
    }

    /// Ends a revocation, done or not; returns how many peers have not confirmed.
    pub(crate) fn end_revocation(&mut self, number: u64) -> usize {
        self.revocations.end(number)
    }

    /// Records that a peer has released everything it held under a revoked grant.
    pub(crate) fn confirm(&mut self, now: Instant, grant: u64, peer: u64) {
        self.revocations.confirm(grant, peer);
        let closed = self.grants.confirm(now, grant, peer);
        self.closed(closed, "revoked");
        self.effects.push(Effect::Confirmed);
    }

    pub(super) fn closed(&mut self, views: Vec<View>, reason: &'static str) {
        self.effects.extend(views.into_iter().map(|view| Effect::Closed { view, reason }));
    }

    /// Whether nothing is left.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.vms.is_empty()
            && self.peers.is_empty()
            && self.grants.is_empty()
            && self.revocations.pending().next().is_none()
    }
}

fn unknown_grant(grant: u64) -> CallError {
    let message = format!("there is no grant {grant}; it may have ended long ago");
    CallError::new(Refusal::Unknown, message)
}

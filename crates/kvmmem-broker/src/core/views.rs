// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening and closing views.

use std::sync::Arc;
use std::time::Instant;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::message::{Caller, Refusal, ViewCounters, VmIdentity};
use kvmmem_proto::name::is_unprintable;
use kvmmem_proto::scope::{Rights, Span};

use super::call_error::CallError;
use super::effect::Effect;
use super::grants::{Access, Grants, UseError, User, View};
use super::introduction::{NotSent, private};
use super::layout::Layout;
use super::machine::Core;

/// The longest name of a process, characters (`TASK_COMM_LEN`).
const MAX_COMM: usize = 16;

/// How a view of a process of the host is listed.
const HOST: &str = "host";

/// What a view is asked for with.
#[derive(Debug)]
pub(crate) struct AttachRequest {
    pub(crate) token: Token,
    pub(crate) caller: Caller,
    pub(crate) read_only: bool,
    pub(crate) reaching: Vec<Span>,
}

/// A view that was opened.
#[derive(Debug)]
pub(crate) struct NewView {
    pub(crate) view: u64,
    pub(crate) opened: Access,
    /// The process that asked, as far as it is known.
    pub(crate) caller: Caller,
    pub(crate) identity: Arc<VmIdentity>,
    pub(crate) layout: Arc<Layout>,
    /// Whether it made a viewer of the peer.
    is_first: bool,
}

impl Core {
    /// Uses a token to open a view: for the VMM of an introspector, or for a process of the host.
    /// The peer hears of the target from then on.
    ///
    /// # Errors
    /// Where the peer's VM is no introspector, the token is not good, a view by it would have no
    /// memory at one of the spans that are to be reached, or the peer has to read first what was
    /// sent to it.
    pub(crate) fn attach(
        &mut self,
        now: Instant,
        who: u64,
        request: &AttachRequest,
        may_get_files: bool,
    ) -> Result<NewView, NotSent> {
        let AttachRequest { token, caller, read_only, reaching } = request;
        let by = self.user(who)?;
        let Access { grant, target, scope } =
            self.grants.would_open(now, token, by).map_err(CallError::from)?;
        let target = self.vms.get(target).ok_or_else(|| CallError::from(UseError::Unknown))?;
        let layout = target.layout.as_ref().ok_or_else(|| CallError::from(UseError::Unknown))?;
        let (identity, layout) = (Arc::clone(&target.identity), Arc::clone(layout));
        let target = target.id;
        if by.vm.is_some() && layout.is_private {
            return Err(private(&identity).into());
        }
        let reached = scope.check_reaches(reaching, &layout.map);
        reached.map_err(|error| CallError::from_error(Refusal::Invalid, &error))?;
        let caller = self.known_caller(caller, who);
        let name = match by.vm.and_then(|vm| self.vms.get(vm)) {
            Some(vm) => vm.identity.name.clone(),
            None => HOST.to_owned(),
        };
        let mut is_first = false;
        let attach = |grants: &mut Grants| {
            let of = (name.as_str(), caller.clone());
            grants.attach(now, grant, by, of, *read_only).map_err(CallError::from)
        };
        let (view, opened) = if by.vm.is_some() {
            self.introducing(who, target, may_get_files, attach)?
        } else {
            let attached = attach(&mut self.grants)?;
            if let Some(peer) = self.peers.get_mut(&who) {
                peer.watch(target);
                is_first = !std::mem::replace(&mut peer.has_views, true);
            }
            attached
        };
        Ok(NewView { view, opened, caller, identity, layout, is_first })
    }

    /// The target that a token would open for a peer, and with which rights. No use is taken.
    pub(crate) fn would_open(
        &mut self,
        now: Instant,
        who: u64,
        token: &Token,
        read_only: bool,
    ) -> Option<(u64, Rights)> {
        let by = self.user(who).ok()?;
        let Access { target, scope, .. } = self.grants.would_open(now, token, by).ok()?;
        Some((target, if read_only { Rights::ReadOnly } else { scope.rights }))
    }

    /// Begins to close a view: it reaches no memory any more. The caller waits for the copies that
    /// are under way, and calls [`Self::close_view`] then.
    ///
    /// # Errors
    /// Where the peer has no such view.
    pub(crate) fn begin_close(
        &mut self,
        view: u64,
        peer: u64,
        counters: ViewCounters,
    ) -> Result<(), CallError> {
        self.count(view, peer, counters)?;
        self.grants.begin_close(view, peer);
        Ok(())
    }

    /// Closes a view. A peer that holds nothing else under the grant need not confirm its
    /// revocation. The view may have ended meanwhile, with its target.
    pub(crate) fn close_view(&mut self, now: Instant, view: u64, peer: u64) {
        if let Some(view) = self.grants.detach(now, view, peer) {
            self.released(view.grant, peer);
            self.effects.push(Effect::Closed { view, reason: "closed" });
        }
    }

    /// Removes a view that its peer was never told of; the token gets its use back.
    pub(crate) fn undo_attach(&mut self, now: Instant, attached: &NewView, peer: u64) {
        self.remove_unused(now, attached.view, peer);
        if let Some(peer) = self.peers.get_mut(&peer).filter(|_| attached.is_first) {
            peer.has_views = false;
        }
    }

    /// Removes a view that its peer cannot use; an operator's token gets its use back.
    pub(super) fn remove_unused(&mut self, now: Instant, view: u64, peer: u64) -> Option<View> {
        let closed = self.grants.undo_attach(now, view, peer)?;
        self.released(closed.grant, peer);
        Some(closed)
    }

    /// A peer that holds nothing more under a grant need not confirm its revocation.
    pub(super) fn released(&mut self, grant: u64, peer: u64) {
        if !self.grants.peers_of(grant).contains(&peer) {
            self.revocations.confirm(grant, peer);
            self.effects.push(Effect::Confirmed);
        }
    }

    /// Records a view's counters.
    ///
    /// # Errors
    /// Where the peer has no such view.
    pub(crate) fn count(
        &mut self,
        view: u64,
        peer: u64,
        counters: ViewCounters,
    ) -> Result<(), CallError> {
        let no_view =
            || CallError::new(Refusal::Unknown, format!("this connection has no view {view}"));
        self.grants.count(view, peer, counters).then_some(()).ok_or_else(no_view)
    }

    /// Who asks, as far as it is known: of a process of the host the socket tells, of one in a VM
    /// the VM's kernel.
    fn known_caller(&self, caller: &Caller, who: u64) -> Caller {
        let printable = |c: char| if is_unprintable(c) { char::REPLACEMENT_CHARACTER } else { c };
        let comm = caller.comm.chars().take(MAX_COMM).map(printable).collect();
        match self.peers.get(&who) {
            Some(peer) if peer.vm.is_none() => {
                Caller { pid: peer.credentials.pid, uid: peer.credentials.uid, comm }
            }
            _ => Caller { comm, ..caller.clone() },
        }
    }

    /// Who brings a token: the VMM of an introspector, or a process of the host.
    ///
    /// # Errors
    /// Where the peer's VM is no introspector.
    pub(super) fn user(&self, who: u64) -> Result<User, CallError> {
        let Some(vm) = self.peers.get(&who).and_then(|peer| peer.vm) else {
            return Ok(User { peer: who, vm: None, uuid: None });
        };
        let introspector = self.vms.get(vm).filter(|vm| vm.identity.introspector);
        let introspector = introspector.ok_or_else(|| {
            CallError::new(Refusal::Denied, "only the VMM of an introspector may redeem a token")
        })?;
        let uuid = Some(introspector.identity.uuid);
        Ok(User { peer: who, vm: Some(vm), uuid })
    }
}

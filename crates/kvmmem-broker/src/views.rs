// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views: opened by a token, closed by whoever has them.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::map::SHARE_IT;
use kvmmem_proto::message::{Answer, Caller, Refusal, ViewCounters};
use kvmmem_proto::name::is_unprintable;
use kvmmem_proto::scope::{Rights, Span};

use crate::broker::{Broker, Refused};
use crate::core::grants::{Opened, UseError, User};
use crate::peer::Peer;
use crate::ram::Ram;
use crate::registry::Vm;
use crate::tokens::{busy, introspector, refuse_use, user};

/// The longest name of a process, characters (`TASK_COMM_LEN`).
const MAX_COMM: usize = 16;

/// How a view of a process of the host is listed.
const HOST: &str = "host";

impl Broker {
    /// Uses a token to open a view: for the VMM of an introspector, or for a process of the host,
    /// which gets the RAM's files as well.
    ///
    /// # Errors
    /// Where the connection's VM is no introspector, the token is not good, or a view by it would
    /// have no memory at one of the spans that are to be reached.
    pub(crate) fn attach(
        &self,
        now: Instant,
        peer: &Peer,
        vm: Option<&Vm>,
        token: &Token,
        (caller, read_only, reaching): (Caller, bool, &[Span]),
    ) -> Result<(Answer, Vec<OwnedFd>), Refused> {
        let by = match vm {
            Some(_) => Some(introspector(vm)?),
            None => None,
        };
        let caller = known_caller(caller, peer, by);
        let name = by.map_or(HOST, |vm| &vm.registration().name);
        if by.is_some() {
            self.refuse_private(now, token, user(peer, by))?;
        }
        self.check_reaches(now, token, user(peer, by), reaching)?;
        let attached = self.core().grants.attach(
            now,
            token,
            user(peer, by),
            (name, caller.clone()),
            read_only,
        );
        let (view, opened) = attached.map_err(refuse_use)?;
        let shown = self.show(peer, by, view, &opened);
        let Ok((target, answer)) = shown else {
            self.core().close_view(self.now(), view, peer.number());
            self.confirmed().notify_all();
            return shown.map(|(_, answer)| answer);
        };
        self.audit().attached(view, (opened.grant, &opened.scope), &target, (peer, by), &caller);
        Ok(answer)
    }

    /// Refuses a VMM the token of a target whose RAM nobody can map, and leaves the token its uses.
    ///
    /// # Errors
    /// [`Refusal::Unsupported`] with the remedy, or where the token is not good.
    pub(crate) fn refuse_private(
        &self,
        now: Instant,
        token: &Token,
        by: User,
    ) -> Result<(), Refused> {
        let (target, _) = self.core().grants.target(now, token, by).map_err(refuse_use)?;
        let vm = self.registry().get(target);
        match vm.as_ref().and_then(|vm| Some((vm, vm.ram()?))) {
            Some((vm, ram)) if ram.is_private() => {
                let name = &vm.registration().name;
                let message = format!(
                    "the RAM of {name:?} is private to its VMM and cannot be mapped; {SHARE_IT}"
                );
                Err(Refused::new(Refusal::Unsupported, message))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a token whose view would not reach one of `spans`. The refusal costs no use of the
    /// token.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] with the span, or where the token is not good.
    pub(crate) fn check_reaches(
        &self,
        now: Instant,
        token: &Token,
        by: User,
        spans: &[Span],
    ) -> Result<(), Refused> {
        if spans.is_empty() {
            return Ok(());
        }
        let (target, scope) = self.core().grants.target(now, token, by).map_err(refuse_use)?;
        // The map may change before the token is used, as it may after.
        let vm = self.registry().get(target);
        let layout = vm.as_ref().and_then(|vm| vm.ram()).map(Ram::layout);
        let layout = layout.ok_or_else(|| refuse_use(UseError::Unknown))?;
        let reached = scope.check_reaches(spans, &layout.map);
        reached.map_err(|error| Refused::from_error(Refusal::Invalid, &error))
    }

    /// What the one who has opened a view is told and given.
    #[allow(clippy::type_complexity, reason = "the answer and the files that go with it")]
    fn show(
        &self,
        peer: &Peer,
        by: Option<&Vm>,
        view: u64,
        opened: &Opened,
    ) -> Result<(Arc<Vm>, (Answer, Vec<OwnedFd>)), Refused> {
        let unknown = || refuse_use(UseError::Unknown);
        let (grant, target, scope) = (opened.grant, opened.target, opened.scope.clone());
        let vm = self.registry().get(target).ok_or_else(unknown)?;
        if by.is_some() {
            peer.introduce(&vm).map_err(|_| busy())?;
            return Ok((vm, (Answer::Attached { view, grant, target, scope }, Vec::new())));
        }
        let layout = peer.watch(&vm).map_err(|_| unknown())?;
        let ram = vm.ram().ok_or_else(unknown)?;
        let files = match scope.rights {
            Rights::ReadOnly => ram.open_read_only(),
            Rights::ReadWrite => ram.duplicate(),
        };
        let files = files.map_err(|error| {
            Refused::new(Refusal::Limit, format!("cannot open the target's RAM: {error}"))
        })?;
        let answer = Answer::HostAttached {
            view,
            grant,
            target,
            scope,
            uuid: vm.registration().uuid,
            name: vm.registration().name.clone(),
            generation: layout.generation,
            regions: layout.regions(),
            copied: layout.is_private,
        };
        Ok((vm, (answer, files)))
    }

    /// The target of a view; `None` once the view has ended: its grant was revoked, or its target
    /// is gone.
    pub(crate) fn target_of_view(&self, peer: &Peer, view: u64) -> Option<Arc<Vm>> {
        let (target, _) = self.core().grants.reach(view, peer.number())?;
        self.registry().get(target)
    }

    /// Closes a view of a connection.
    ///
    /// # Errors
    /// Where it has no such view.
    pub(crate) fn detach(
        &self,
        peer: &Peer,
        view: u64,
        counters: ViewCounters,
    ) -> Result<(), Refused> {
        if !self.core().begin_close(view, peer.number(), counters) {
            return Err(no_view(view));
        }
        // Those that were looked up while the view was open.
        peer.wait_for_copies();
        let closed = self.core().close_view(self.now(), view, peer.number());
        self.confirmed().notify_all();
        // The target may have gone meanwhile, which has ended the view.
        self.tell_ended(closed.as_slice(), "closed");
        Ok(())
    }

    /// Takes note of a view's counters.
    ///
    /// # Errors
    /// Where the connection has no such view.
    pub(crate) fn count(
        &self,
        peer: &Peer,
        view: u64,
        counters: ViewCounters,
    ) -> Result<(), Refused> {
        let is_known = self.core().grants.count(view, peer.number(), counters);
        if is_known { Ok(()) } else { Err(no_view(view)) }
    }
}

fn no_view(view: u64) -> Refused {
    Refused::new(Refusal::Unknown, format!("this connection has no view {view}"))
}

/// Who asks, as far as it is known: of a process of the host the socket tells, of one in a VM the
/// VM's kernel.
fn known_caller(caller: Caller, peer: &Peer, vm: Option<&Vm>) -> Caller {
    let comm = caller.comm.chars().take(MAX_COMM);
    let comm =
        comm.map(|c| if is_unprintable(c) { char::REPLACEMENT_CHARACTER } else { c }).collect();
    let credentials = peer.credentials();
    match vm {
        Some(_) => Caller { comm, ..caller },
        None => Caller { pid: credentials.pid, uid: credentials.uid, comm },
    }
}

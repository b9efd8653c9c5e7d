// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Carries out what the core has decided: files, waiting and the audit log.

pub(crate) mod mint;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Answer, Call, NewGrant, Refusal, RevokeReport};
use kvmmem_proto::scope::Rights;

use mint::random_token;

use crate::audit::Event;
use crate::broker::Broker;
use crate::core::Core;
use crate::core::call::{Means, Reply};
use crate::core::call_error::CallError;
use crate::core::revocation::Revocation;
use crate::core::views::NewView;
use crate::peer::{NotSent, Peer, READ_LIMIT, READ_PAUSE};
use crate::registry::Vm;
use crate::sync::checked::wait_while;
use crate::tables::Tables;

/// What came of a call.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It is answered, with these files.
    Answer(Answer, Vec<OwnedFd>),
    /// It is not answered.
    Done,
    /// The peer may do this.
    Allowed(Call),
}

impl From<Answer> for Outcome {
    fn from(answer: Answer) -> Self {
        Self::Answer(answer, Vec::new())
    }
}

impl Broker {
    /// Has the core decide a peer's call, and carries it out where that needs neither processes nor
    /// threads. To be called on the peer's own thread, for it waits: for a peer that has to read
    /// what was sent to it, and for confirmations.
    pub(crate) fn handle(
        &self,
        peer: &Peer,
        vm: Option<&Vm>,
        call: Call,
    ) -> Result<Outcome, CallError> {
        let files = match &call {
            Call::Attach { token, read_only, .. } if vm.is_none() => {
                self.files_for(peer, token, *read_only)?
            }
            _ => None,
        };
        let began = Instant::now();
        let (reply, target) = self.decide_call(peer, call)?;
        let by = peer.credentials();
        let target = target.as_deref();
        Ok(match reply {
            Reply::Answer(answer) => answer.into(),
            Reply::Nothing | Reply::Unread(_) => Outcome::Done,
            Reply::Allowed(call) => Outcome::Allowed(call),
            Reply::Granted { request, token, opened } => {
                if let Some(target) = target {
                    let (vm, opened, request) = (target, &opened, &request);
                    self.audit().write(Event::Granted { vm, opened, request, by });
                }
                Answer::Granted(NewGrant { grant: opened.grant, token }).into()
            }
            Reply::Redeemed(opened) => {
                if let (Some(target), Some(vm)) = (target, vm) {
                    self.audit().write(Event::Used { grant: opened.grant, target, by: vm });
                }
                let (grant, target, scope) = (opened.grant, opened.target, opened.scope);
                Answer::Redeemed { grant, target, scope }.into()
            }
            Reply::Used(opened) => {
                if let (Some(target), Some(vm)) = (target, vm) {
                    self.audit().write(Event::Used { grant: opened.grant, target, by: vm });
                }
                Outcome::Done
            }
            Reply::Attached(attached) => {
                let target = target.ok_or_else(CallError::busy)?;
                let (answer, files) = self.show(peer, vm.is_some(), &attached, files)?;
                let (opened, caller) = (&attached.opened, &attached.caller);
                let (view, by) = (attached.view, vm);
                self.audit().write(Event::Attached { view, opened, target, peer, by, caller });
                Outcome::Answer(answer, files)
            }
            Reply::PolicySet { uuid, policy } => {
                self.audit().write(Event::Policy { uuid, policy, by });
                Answer::Policy { policy }.into()
            }
            Reply::Revoking { grant, revocation } => {
                Answer::Revoked(self.await_revocation(began, grant, &revocation, by)).into()
            }
            Reply::Closing { view } => {
                self.after_copies(peer, |core, now, who| core.close_view(now, view, who));
                Outcome::Done
            }
            Reply::Undoing { view } => {
                self.after_copies(peer, |core, now, who| core.undo_view(now, view, who));
                Outcome::Done
            }
            Reply::Confirming { grant } => {
                self.after_copies(peer, |core, now, who| core.confirm(now, grant, who));
                Outcome::Done
            }
        })
    }

    /// The core's decision, and the target that it is about. What it pushes to the peer is sent.
    fn decide_call(
        &self,
        peer: &Peer,
        mut call: Call,
    ) -> Result<(Reply, Option<Arc<Vm>>), CallError> {
        let mut means = Means::default();
        if matches!(call, Call::Grant(_)) {
            means.token = random_token().ok();
        }
        let gives_files = matches!(call, Call::Redeem { .. } | Call::Attach { .. });
        let deadline = Instant::now() + READ_LIMIT;
        // The first attempt does not look what the peer has read: most peers know the target.
        let mut is_second = false;
        loop {
            let now = self.now();
            let who = peer.number();
            // Held until the pushes of this call are sent: at most one packet with descriptors is
            // under way to a peer.
            let sending = gives_files.then(|| peer.outbox().sending());
            if let Some(sending) = sending.as_ref().filter(|_| is_second) {
                // What waits is sent before it is looked at what the peer has read.
                let _ = peer.flush_held(sending);
                means.may_get_files = peer.has_read().map_err(|_| CallError::busy())?;
            }
            let handle = |tables: &mut Tables| {
                let reply = tables.core.handle(now, who, call, &means)?;
                let target = reply.target().and_then(|target| tables.vms.get(&target).cloned());
                Ok::<_, CallError>((reply, target))
            };
            let (decided, pending) = self.decide_only(handle);
            let sent = sending.as_ref().map_or(Ok(()), |sending| peer.flush_held(sending));
            drop(sending);
            self.perform(pending);
            match (decided?, sent) {
                ((Reply::Unread(again), _), _) => {
                    if Instant::now() >= deadline {
                        return Err(CallError::busy());
                    }
                    if is_second {
                        std::thread::sleep(READ_PAUSE);
                    }
                    is_second = true;
                    call = again;
                }
                ((Reply::Attached(attached), _), Err(failed)) => {
                    self.undo_attach(peer, &attached, failed.target);
                    return Err(CallError::busy());
                }
                ((Reply::Redeemed(opened), _), Err(NotSent { target: Some(_) })) => {
                    self.decide(|tables| tables.core.undo_redeem(now, who, &opened));
                    return Err(CallError::busy());
                }
                (decided, _) => return Ok(decided),
            }
        }
    }

    /// Opens the files that a process of the host is going to get for a token, before a use of the
    /// token is taken: it keeps its use where that fails. `None` where the token opens nothing.
    fn files_for(
        &self,
        peer: &Peer,
        token: &Token,
        read_only: bool,
    ) -> Result<Option<Vec<OwnedFd>>, CallError> {
        let (now, mut tables) = (self.now(), self.tables());
        let opened = tables.core.would_open(now, peer.number(), token, read_only);
        let ram =
            opened.and_then(|(target, rights)| Some((tables.vms.get(&target)?.ram()?, rights)));
        drop(tables);
        let Some((ram, rights)) = ram else { return Ok(None) };
        let files = match rights {
            Rights::ReadOnly => ram.open_read_only(),
            Rights::ReadWrite => ram.duplicate(),
        };
        files.map(Some).map_err(|error| {
            CallError::new(Refusal::Limit, format!("cannot open the target's RAM: {error}"))
        })
    }

    /// The answer to an attach, and the files that go with it.
    fn show(
        &self,
        peer: &Peer,
        is_vmm: bool,
        attached: &NewView,
        files: Option<Vec<OwnedFd>>,
    ) -> Result<(Answer, Vec<OwnedFd>), CallError> {
        let NewView { view, opened, identity, layout, .. } = attached;
        let (view, grant, scope) = (*view, opened.grant, opened.scope.clone());
        if is_vmm {
            let target = opened.target;
            return Ok((Answer::Attached { view, grant, target, scope }, Vec::new()));
        }
        // A token's target and rights do not change, so there are none only if there was no token.
        let files = files.ok_or_else(|| {
            self.undo_attach(peer, attached, None);
            CallError::busy()
        })?;
        let answer = Answer::HostAttached {
            view,
            grant,
            target: opened.target,
            scope,
            uuid: identity.uuid,
            name: identity.name.clone(),
            generation: layout.generation,
            regions: layout.regions(),
            copied: layout.is_private,
        };
        Ok((answer, files))
    }

    fn undo_attach(&self, peer: &Peer, attached: &NewView, unsent: Option<u64>) {
        let (now, who) = (self.now(), peer.number());
        self.decide(|tables| {
            tables.core.undo_attach(now, attached, who);
            if let Some(target) = unsent {
                tables.core.not_introduced(who, target);
            }
        });
    }

    /// Decides that a peer has released something, once no copy from it is under way that was
    /// allowed before: a peer's word says nothing of its channels.
    fn after_copies(&self, peer: &Peer, release: impl FnOnce(&mut Core, Instant, u64)) {
        peer.wait_for_copies();
        let now = self.now();
        self.decide(|tables| release(&mut tables.core, now, peer.number()));
    }

    /// Revokes a grant; nothing, where it has ended.
    pub(crate) fn revoke(&self, grant: u64, by: Credentials) {
        let (now, began) = (self.now(), Instant::now());
        if let Ok(revocation) = self.decide(|tables| tables.core.revoke(now, grant)) {
            self.await_revocation(began, grant, &revocation, by);
        }
    }

    fn await_revocation(
        &self,
        began: Instant,
        grant: u64,
        revocation: &Revocation,
        by: Credentials,
    ) -> RevokeReport {
        let revoked = self.await_confirmations(began, revocation);
        let (target, outcome) = (revocation.target, &revoked);
        self.audit().write(Event::Revoked { grant, target, outcome, by });
        revoked
    }

    /// Waits until all peers of a revocation have confirmed or ended, for a limited time. The
    /// revocation began before they were notified.
    fn await_confirmations(&self, began: Instant, revocation: &Revocation) -> RevokeReport {
        let number = revocation.number;
        let is_waiting = |tables: &mut Tables| !tables.core.is_revoked(number);
        let deadline = Instant::now() + self.limits().confirmation;
        let mut tables = wait_while(self.confirmed(), self.tables(), deadline, is_waiting);
        let unconfirmed = tables.core.end_revocation(number);
        drop(tables);
        RevokeReport {
            views: u32::try_from(revocation.views).unwrap_or(u32::MAX),
            unconfirmed: u32::try_from(unconfirmed).unwrap_or(u32::MAX),
            micros: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use kvmmem_proto::packet::PacketSocket;

    use super::*;

    #[test]
    fn what_a_peer_releases_is_released_after_the_copies_that_were_allowed_before() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket = PacketSocket::accepted(socket.into(), Duration::from_secs(1)).unwrap();
        let peer = Arc::new(Peer::new(socket, Credentials { pid: 1, uid: 0 }));
        let broker = Broker::new(crate::core::limits::Limits::default());
        let copying = peer.copying();
        let (done, is_done) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                broker.after_copies(&peer, |core, now, who| core.confirm(now, 1, who));
                done.send(()).unwrap();
            });
            let early = is_done.recv_timeout(Duration::from_millis(50));
            drop(copying);
            assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout));
            is_done.recv_timeout(Duration::from_secs(60)).unwrap();
        });
    }
}

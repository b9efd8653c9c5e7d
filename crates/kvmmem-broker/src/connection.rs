// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One peer's requests, in order.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::message::{Answer, Call, Caller, FromBroker, Refusal, Registration, Request};
use kvmmem_proto::packet::{PacketError, Wait};
use kvmmem_proto::scope::Span;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::broker::{Broker, Refused};
use crate::core::role::Role;
use crate::peer::Peer;
use crate::ram::Ram;
use crate::registry::{RegisterError, Vm};
use crate::vcpus::Held;

/// How long a wrong token, or a call that makes no sense, delays the next request of that
/// connection: a guest that tries tokens waits itself, and costs the broker next to nothing.
const PAUSE: Duration = Duration::from_millis(1);

/// How long a change of RAM delays the next request of that connection: each is pushed to all who
/// know the VM.
const CHANGE_PAUSE: Duration = Duration::from_millis(10);

/// An answer, and the files that go with it.
type Outcome = (Answer, Vec<OwnedFd>);

/// A connection and the VM that it has registered.
struct Connection<'a> {
    broker: &'a Arc<Broker>,
    peer: &'a Arc<Peer>,
    vm: Option<Arc<Vm>>,
    /// Whether the call before this one registered the VM: only then may its generation be
    /// continued.
    has_just_registered: bool,
    /// Whether it has opened a view as a process of the host.
    has_views: bool,
    /// The pause that it holds; it ends with the connection.
    pause: Option<Held>,
    /// How long it may be silent; `None` for ever.
    silence: Option<Duration>,
}

/// Serves a peer until it closes, is silent too long, does not read its answers or sends what is no
/// request.
pub(crate) fn serve(broker: &Arc<Broker>, peer: &Arc<Peer>) {
    broker.join(peer);
    let silence = Some(broker.limits().silence);
    let mut connection = Connection {
        broker,
        peer,
        vm: None,
        has_just_registered: false,
        has_views: false,
        pause: None,
        silence,
    };
    if let Err(error) = connection.run() {
        if matches!(
            error,
            PacketError::TooLong | PacketError::TooManyFds | PacketError::Malformed(_)
        ) {
            refuse(peer, 0, &Refused::from_error(Refusal::Malformed, &error));
        }
        // Without what is behind it: that may repeat parts of the packet.
        broker.audit().refused(peer, connection.vm.as_deref(), &error.to_string());
    }
    peer.vcpu_questions().close();
    broker.resume_left(peer.credentials(), connection.pause.take());
    broker.leave(peer, connection.vm.as_deref());
    // Others may still hold on to the peer for a moment; the connection ends now.
    peer.shut_down();
}

impl Connection<'_> {
    fn run(&mut self) -> Result<(), PacketError> {
        // Descriptors that come with a call that takes none are closed by going out of scope.
        while let Some((request, files)) = self.receive()? {
            let Request { id, call } = request;
            let is_answered = !call.is_one_way();
            match self.carry_out(call, files) {
                Ok(None) => {}
                Ok(Some((answer, files))) => {
                    if !files.is_empty() {
                        self.peer.wait_until_read()?;
                    }
                    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
                    let answer = FromBroker::Answer { id, answer };
                    self.peer.send(&answer, &files, Wait::Limited)?;
                }
                Err(refused) => {
                    if is_answered {
                        refuse(self.peer, id, &refused);
                    }
                    self.broker.audit().refused(self.peer, self.vm.as_deref(), &refused.message);
                    if refused.refusal == Refusal::Unknown || !is_answered {
                        std::thread::sleep(PAUSE);
                    }
                }
            }
        }
        Ok(())
    }

    /// Waits for the next request; `None` when the peer has closed.
    fn receive(&self) -> Result<Option<(Request, Vec<OwnedFd>)>, PacketError> {
        let Some(socket) = self.peer.socket() else { return Ok(None) };
        let limit = self.silence.and_then(|limit| Timespec::try_from(limit).ok());
        loop {
            match rustix::event::poll(&mut [PollFd::new(socket, PollFlags::IN)], limit.as_ref()) {
                Ok(0) => return Err(PacketError::Receive(Errno::AGAIN)),
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(PacketError::Receive(error)),
            }
        }
        self.broker.buffers().lend(|buffer| socket.receive(buffer))
    }

    /// Carries out a call; `None` where it is not answered.
    fn carry_out(&mut self, call: Call, files: Vec<OwnedFd>) -> Result<Option<Outcome>, Refused> {
        let now = self.broker.now();
        let has_just_registered = std::mem::take(&mut self.has_just_registered);
        self.role().check(&call)?;
        let (broker, peer, vm) = (self.broker, self.peer, self.vm.as_deref());
        let credentials = peer.credentials();
        let answer = match call {
            Call::Register(registration) => self.register(registration, files)?,
            Call::Redeem { token } => broker.redeem(now, vm, &token)?,
            Call::Attach { token, caller, read_only, reaching } => {
                return self.attach(&token, (caller, read_only, &reaching)).map(Some);
            }
            Call::OpenCopies { view } => return broker.open_copies(peer, view, files).map(Some),
            Call::Used { token } => return broker.used(now, vm, &token).map(|()| None),
            Call::Detached { view, counters } => {
                return broker.detach(peer, view, counters).map(|()| None);
            }
            Call::Counters { view, counters } => {
                return broker.count(peer, view, counters).map(|()| None);
            }
            Call::RevokedDone { grant } => {
                broker.revoked_done(peer, grant);
                return Ok(None);
            }
            Call::RamChanged { regions, change } => {
                broker.ram_changed(vm, regions, change)?;
                std::thread::sleep(CHANGE_PAUSE);
                return Ok(None);
            }
            Call::Continued { generation } => {
                if !has_just_registered {
                    let message =
                        "only the first call after the registration may continue a generation";
                    return Err(Refused::new(Refusal::Denied, message));
                }
                broker.ram_continued(vm, generation)?;
                std::thread::sleep(CHANGE_PAUSE);
                return Ok(None);
            }
            Call::VcpuAnswer { id, answer } => {
                peer.vcpu_questions().answer(id, answer);
                return Ok(None);
            }
            Call::Grant(request) => broker.grant(now, credentials, &request)?,
            Call::Grants { after } => broker.list_grants(now, after),
            Call::Revoke { grant } => broker.revoke(credentials, grant)?,
            Call::Policy { target, set } => broker.policy(credentials, &target, set)?,
            Call::Targets { after } => broker.list(after),
            Call::AddTarget { which, name } => broker.add_target(credentials, &which, name)?,
            Call::RemoveTarget { target } => broker.remove_target(&target)?,
            Call::AddIntrospector { which, cid, name, on_silence } => {
                broker.add_introspector(credentials, &which, cid, name, on_silence)?
            }
            Call::RemoveIntrospector { name } => broker.remove_introspector(&name)?,
            Call::FreeSlots { introspector } => broker.free_slots(&introspector)?,
            Call::Registers { target, first } => broker.registers(credentials, &target, first)?,
            Call::Pause { target } => broker.pause(credentials, &target, &mut self.pause)?,
            Call::Resume { target } => broker.resume(credentials, &target, self.pause.take())?,
            Call::Hook { target, endpoint } => broker.hook(credentials, &target, endpoint)?,
            Call::Unhook { target, endpoint } => broker.unhook(credentials, &target, &endpoint)?,
        };
        Ok(Some((answer, Vec::new())))
    }

    /// What the connection is by now.
    fn role(&self) -> Role {
        match self.peer.credentials() {
            _ if self.vm.is_some() => Role::Vmm,
            _ if self.has_views => Role::Viewer,
            credentials if credentials.is_administrator() => Role::Administrator,
            _ => Role::Operator,
        }
    }

    fn attach(&mut self, token: &Token, view: (Caller, bool, &[Span])) -> Result<Outcome, Refused> {
        let vm = self.vm.as_deref();
        let outcome = self.broker.attach(self.broker.now(), self.peer, vm, token, view)?;
        if vm.is_none() {
            self.has_views = true;
            // For months, like a VM.
            self.silence = None;
        }
        Ok(outcome)
    }

    fn register(
        &mut self,
        mut registration: Registration,
        files: Vec<OwnedFd>,
    ) -> Result<Answer, Refused> {
        let refused = |error: RegisterError| Refused::from_registering(&error);
        let mut ram = Ram::registered(&mut registration, files).map_err(refused)?;
        let (peer, by) = (Arc::clone(self.peer), self.peer.credentials());
        let inserted = self.broker.registry().insert(registration, &mut ram, peer, by);
        let vm = inserted.map_err(refused)?;
        self.broker.audit().registered(&vm);
        let (number, generation) = (vm.id(), vm.ram().map_or(0, |ram| ram.layout().generation));
        self.vm = Some(vm);
        self.has_just_registered = true;
        self.silence = None;
        Ok(Answer::Registered { vm: number, generation })
    }
}

/// Tells a peer that a request is refused. One that does not read it is not worth waiting for.
pub(crate) fn refuse(peer: &Peer, id: u64, refused: &Refused) {
    let message =
        FromBroker::Refused { id, refusal: refused.refusal, message: refused.message.clone() };
    let _ = peer.send(&message, &[], Wait::No);
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One peer's requests, in order.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use kvmmem_proto::message::{Answer, Call, FromBroker, Refusal, Registration, Request};
use kvmmem_proto::packet::{PacketError, PacketSocket, Wait};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::audit::Event;
use crate::calls::Outcome;
use crate::core::call_error::CallError;
use crate::peer::Peer;
use crate::ram::Ram;
use crate::registry::Vm;
use crate::service::Service;
use crate::vcpus::{NextRegisters, VmPause};

/// How long a wrong token, or a call that makes no sense, delays the next request of that
/// connection: a guest that tries tokens waits itself, and costs the broker next to nothing.
const PAUSE: Duration = Duration::from_millis(1);

/// How long a change of RAM delays the next request of that connection: each is pushed to all who
/// know the VM.
const CHANGE_PAUSE: Duration = Duration::from_millis(10);

/// How long a thread waits for the next request of a peer that may be silent for months. A VMM
/// whose views are in use reports counters each second.
const IDLE: Duration = Duration::from_secs(5);

/// A connection and the VM that it has registered. It has a thread while it is served, and waits
/// without one while it is idle.
pub(crate) struct Connection {
    service: Arc<Service>,
    peer: Arc<Peer>,
    vm: Option<Arc<Vm>>,
    /// Whether the call before this one registered the VM: only then may its generation be
    /// continued.
    has_just_registered: bool,
    /// The pause that it holds; it ends with the connection.
    pause: Option<VmPause>,
    next_registers: Option<Box<NextRegisters>>,
    /// How long it may be silent; `None` for ever.
    silence: Option<Duration>,
}

/// Why a thread serves a connection no more.
enum Stop {
    /// The peer has closed.
    Closed,
    /// The peer has nothing to ask.
    Idle,
}

impl Connection {
    /// The connection of a peer that has asked for nothing yet.
    pub(crate) fn new(service: &Arc<Service>, peer: &Arc<Peer>) -> Self {
        let (service, peer) = (Arc::clone(service), Arc::clone(peer));
        let broker = service.broker();
        broker.join(&peer);
        let silence = Some(broker.limits().silence);
        Self {
            service,
            peer,
            vm: None,
            has_just_registered: false,
            pause: None,
            next_registers: None,
            silence,
        }
    }

    /// Serves a peer until it closes, is silent too long, does not read its answers or sends what
    /// is no request.
    ///
    /// Returns the connection where the peer is idle, and its silence has no limit: it is to be
    /// served again once the peer has sent something.
    pub(crate) fn serve(mut self) -> Option<Self> {
        match self.run() {
            Ok(Stop::Idle) => return Some(self),
            Ok(Stop::Closed) => {}
            Err(error) => self.report(&error),
        }
        let Self { service, peer, vm, mut pause, .. } = self;
        peer.vcpu_questions().close();
        service.resumed(peer.credentials(), &mut pause, "the connection ended");
        service.broker().leave(&peer, vm.as_deref());
        // Other threads may still have the peer for a moment; the connection ends now.
        peer.shut_down();
        None
    }

    /// Says why the broker ends a connection.
    fn report(&self, error: &PacketError) {
        let refusal = match error {
            PacketError::TooLong | PacketError::TooManyFds | PacketError::Malformed(_) => {
                Some(Refusal::Malformed)
            }
            PacketError::NoDescriptors => Some(Refusal::Limit),
            _ => None,
        };
        if let Some(refusal) = refusal {
            refuse(&self.peer, 0, &CallError::from_error(refusal, error));
        }
        // Without its sources, which may repeat parts of the packet.
        let (peer, vm, reason) = (&self.peer, self.vm.as_deref(), &error.to_string());
        self.service.broker().audit().write(Event::Refused { peer, vm, reason });
    }

    fn run(&mut self) -> Result<Stop, PacketError> {
        loop {
            if !self.wait()? {
                return Ok(Stop::Idle);
            }
            // Descriptors that come with a call that takes none are closed by going out of scope.
            let Some((request, files)) = self.receive()? else { return Ok(Stop::Closed) };
            let Request { id, call } = request;
            let is_answered = !call.is_one_way();
            match self.carry_out(call, files) {
                Ok(Outcome::Done | Outcome::Allowed(_)) => {}
                Ok(Outcome::Answer(answer, files)) => {
                    if !files.is_empty() {
                        self.peer.wait_until_read()?;
                    }
                    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
                    let answer = FromBroker::Answer { id, answer };
                    self.peer.send(&answer, &files, Wait::Limited)?;
                }
                Err(refused) => {
                    if is_answered {
                        refuse(&self.peer, id, &refused);
                    }
                    let (peer, vm, reason) = (&self.peer, self.vm.as_deref(), &refused.message);
                    self.service.broker().audit().write(Event::Refused { peer, vm, reason });
                    if refused.refusal == Refusal::Unknown || !is_answered {
                        std::thread::sleep(PAUSE);
                    }
                }
            }
        }
    }

    /// Waits for the next request, or for the end; false where the peer is idle, and its silence
    /// has no limit.
    ///
    /// # Errors
    /// Where it is silent too long.
    fn wait(&self) -> Result<bool, PacketError> {
        let limit = Timespec::try_from(self.silence.unwrap_or(IDLE)).ok();
        let poll = |socket: &PacketSocket| {
            rustix::event::poll(&mut [PollFd::new(socket, PollFlags::IN)], limit.as_ref())
        };
        loop {
            match self.peer.with_socket(poll).unwrap_or(Ok(1)) {
                Ok(0) if self.silence.is_none() => return Ok(false),
                Ok(0) => return Err(PacketError::Receive(Errno::AGAIN)),
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(PacketError::Receive(error)),
            }
        }
    }

    /// The next request; `None` when the peer has closed.
    fn receive(&self) -> Result<Option<(Request, Vec<OwnedFd>)>, PacketError> {
        let receive = |buffer: &mut _| self.peer.with_socket(|socket| socket.receive(buffer));
        self.service.broker().buffers().lend(receive).unwrap_or(Ok(None))
    }

    fn carry_out(&mut self, call: Call, files: Vec<OwnedFd>) -> Result<Outcome, CallError> {
        let has_just_registered = std::mem::take(&mut self.has_just_registered);
        let (service, peer, vm) = (&self.service, &self.peer, self.vm.as_deref());
        let broker = service.broker();
        let call = match broker.handle(peer, vm, call)? {
            Outcome::Allowed(call) => call,
            outcome => {
                if matches!(outcome, Outcome::Answer(Answer::HostAttached { .. }, _)) {
                    // For months, like a VM.
                    self.silence = None;
                }
                return Ok(outcome);
            }
        };
        let credentials = peer.credentials();
        let answer = match call {
            Call::Register(registration) => self.register(registration, files)?,
            Call::OpenCopies { view } => {
                let (answer, files) = broker.open_copies(peer, view, files)?;
                return Ok(Outcome::Answer(answer, files));
            }
            Call::RamChanged { regions, change } => {
                broker.ram_changed(vm, regions, change)?;
                std::thread::sleep(CHANGE_PAUSE);
                return Ok(Outcome::Done);
            }
            Call::Continued { generation } => {
                if !has_just_registered {
                    let message =
                        "only the first call after the registration may continue a generation";
                    return Err(CallError::new(Refusal::Denied, message));
                }
                broker.ram_continued(vm, generation)?;
                std::thread::sleep(CHANGE_PAUSE);
                return Ok(Outcome::Done);
            }
            Call::VcpuAnswer { id, answer } => {
                peer.vcpu_questions().answer(id, answer);
                return Ok(Outcome::Done);
            }
            Call::Targets { after } => broker.list(after),
            Call::AddTarget { which, name } => service.add_target(credentials, &which, name)?,
            Call::RemoveTarget { target } => service.remove_target(&target)?,
            Call::AddIntrospector(request) => service.add_introspector(credentials, &request)?,
            Call::RemoveIntrospector { name } => service.remove_introspector(&name)?,
            Call::FreeSlots { introspector } => service.free_slots(&introspector)?,
            Call::Registers { target, first } => {
                service.registers(credentials, &target, first, &mut self.next_registers)?
            }
            Call::Pause { target } => service.pause(credentials, &target, &mut self.pause)?,
            Call::Resume { target } => service.resume(credentials, &target, &mut self.pause)?,
            Call::Hook { target, endpoint } => service.hook(credentials, &target, endpoint)?,
            Call::Unhook { target, endpoint } => service.unhook(credentials, &target, &endpoint)?,
            Call::Redeem { .. }
            | Call::Attach { .. }
            | Call::Used { .. }
            | Call::Detached { .. }
            | Call::Unreceived { .. }
            | Call::Counters { .. }
            | Call::RevokedDone { .. }
            | Call::Grant(_)
            | Call::Grants { .. }
            | Call::Revoke { .. }
            | Call::Policy { .. } => return Ok(Outcome::Done),
        };
        Ok(answer.into())
    }

    fn register(
        &mut self,
        registration: Registration,
        files: Vec<OwnedFd>,
    ) -> Result<Answer, CallError> {
        let Registration { identity, vcpu_questions, regions } = registration;
        let mut ram = Ram::registered(&identity, regions, files)?;
        let (peer, by) = (Arc::clone(&self.peer), self.peer.credentials());
        peer.vcpu_questions().set_answering(vcpu_questions);
        let vm = self.service.broker().register(identity, &mut ram, peer, by)?;
        self.service.broker().audit().write(Event::Registered(&vm));
        let (number, generation) = (vm.id(), vm.ram().map_or(0, |ram| ram.layout().generation));
        self.vm = Some(vm);
        self.has_just_registered = true;
        self.silence = None;
        Ok(Answer::Registered { vm: number, generation })
    }
}

/// Answers that a request is refused. A peer that does not read is not waited for.
pub(crate) fn refuse(peer: &Peer, id: u64, refused: &CallError) {
    let message =
        FromBroker::Refused { id, refusal: refused.refusal, message: refused.message.clone() };
    let _ = peer.send(&message, &[], Wait::No);
}

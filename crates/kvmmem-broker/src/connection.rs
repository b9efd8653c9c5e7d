// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One peer's requests, in order.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::audit;
use crate::broker::{Broker, Refused};
use crate::packet::{PacketBuffer, PacketError, Wait};
use crate::peer::Peer;
use crate::registry::{RegisterError, Vm};
use crate::wire::{Answer, Call, FromBroker, Refusal, Registration, Request};

/// How long a peer that has not registered may be silent.
const IDLE_LIMIT: Duration = Duration::from_secs(10);

/// How long a failed redeem delays the next request of that connection: a guest that tries tokens waits itself, and
/// costs the broker next to nothing.
const WRONG_TOKEN_PAUSE: Duration = Duration::from_millis(1);

/// A connection and the VM that it has registered.
struct Connection<'a> {
    broker: &'a Arc<Broker>,
    peer: &'a Arc<Peer>,
    vm: Option<Arc<Vm>>,
}

/// Serves a peer until it closes, is silent too long, does not read its answers or sends what is no request.
pub(crate) fn serve(broker: &Arc<Broker>, peer: &Arc<Peer>) {
    let mut connection = Connection { broker, peer, vm: None };
    if let Err(error) = connection.run() {
        if matches!(error, PacketError::TooLong | PacketError::TooManyFds | PacketError::Malformed(_)) {
            refuse(peer, 0, &Refused::from_error(Refusal::Malformed, &error));
        }
        // Without what is behind it: that may repeat parts of the packet.
        audit::refused(peer.credentials(), &error.to_string());
    }
    if let Some(vm) = connection.vm {
        broker.retire(&vm);
    }
    // Others may still hold on to the peer for a moment; the connection ends now.
    peer.socket().shut_down();
}

impl Connection<'_> {
    fn run(&mut self) -> Result<(), PacketError> {
        let mut buffer = PacketBuffer::default();
        let socket = self.peer.socket();
        socket.limit_receive(Some(IDLE_LIMIT))?;
        // A descriptor that comes with anything else than a registration is closed by going out of scope.
        while let Some((request, fd)) = socket.receive::<Request>(&mut buffer)? {
            let Request { id, call } = request;
            let silent = call.is_one_way();
            let outcome = self.carry_out(call, fd);
            if silent {
                continue;
            }
            match outcome {
                Ok(answer) => socket.send(&FromBroker::Answer { id, answer }, None, Wait::Limited)?,
                Err(refused) => {
                    refuse(self.peer, id, &refused);
                    audit::refused(self.peer.credentials(), &refused.message);
                    if refused.refusal == Refusal::Unknown {
                        std::thread::sleep(WRONG_TOKEN_PAUSE);
                    }
                }
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, call: Call, fd: Option<OwnedFd>) -> Result<Answer, Refused> {
        let now = Instant::now();
        let credentials = self.peer.credentials();
        match call {
            Call::Register(registration) => self.register(registration, fd),
            Call::Redeem { token } => self.broker.redeem(now, self.vm.as_deref(), &token),
            Call::Used { token } => {
                self.broker.used(now, self.vm.as_deref(), &token);
                Ok(Answer::Done)
            }
            Call::Attach { .. }
            | Call::Detached { .. }
            | Call::Counters { .. }
            | Call::RevokedDone { .. }
            | Call::RamChanged { .. }
            | Call::Grant(_)
            | Call::Grants { .. }
            | Call::Revoke { .. }
            | Call::Policy { .. } => {
                Err(Refused::new(Refusal::Denied, "this broker does not serve views yet"))
            }
            Call::Targets { after } => Ok(self.broker.list(after)),
            Call::Hook { target, endpoint } => self.broker.hook(credentials, &target, endpoint),
            Call::Unhook { target, endpoint } => self.broker.unhook(credentials, &target, &endpoint),
        }
    }

    fn register(&mut self, registration: Registration, ram: Option<OwnedFd>) -> Result<Answer, Refused> {
        if self.vm.is_some() {
            return Err(Refused::new(Refusal::Denied, "this connection has registered a VM already"));
        }
        let vm = self
            .broker
            .registry()
            .insert(registration, ram, Arc::clone(self.peer))
            .map_err(|error| Refused::from_error(kind(&error), &error))?;
        audit::registered(&vm);
        let number = vm.id();
        self.vm = Some(vm);
        // A VM may run for months without a word.
        self.peer
            .socket()
            .limit_receive(None)
            .map_err(|error| Refused::from_error(Refusal::Limit, &error))?;
        Ok(Answer::Registered { vm: number })
    }
}

/// Tells a peer that a request is refused. One that does not read it is not worth waiting for.
pub(crate) fn refuse(peer: &Peer, id: u64, refused: &Refused) {
    let message = FromBroker::Refused { id, refusal: refused.refusal, message: refused.message.clone() };
    let _ = peer.socket().send(&message, None, Wait::No);
}

fn kind(error: &RegisterError) -> Refusal {
    match error {
        RegisterError::NameTaken(_) | RegisterError::UuidTaken(_) | RegisterError::CidTaken(_) => {
            Refusal::Exists
        }
        RegisterError::Full => Refusal::Limit,
        RegisterError::Name
        | RegisterError::Uuid
        | RegisterError::Vcpus(_)
        | RegisterError::Cid(_)
        | RegisterError::NoRam
        | RegisterError::Ram(_) => Refusal::Invalid,
    }
}

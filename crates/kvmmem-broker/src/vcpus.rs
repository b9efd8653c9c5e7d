// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registers and pauses of VMs whose VMM can be asked: by the monitor that the broker listens to,
//! or by the connection that has registered the VM.

use std::sync::Arc;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Answer, Refusal};
use kvmmem_qemu::questions::{AskError, Pause, Questions};

use crate::audit::Event;
use crate::core::call_error::CallError;
use crate::peer::Peer;
use crate::registry::Vm;
use crate::service::Service;

/// The vCPUs in one answer: keeps it within a packet.
const PAGE: u32 = 16;

/// A client's pause of a VM.
pub(crate) struct VmPause {
    vm: Arc<Vm>,
    pause: Pause,
}

/// First vCPU of the page that follows the pages which a client has read.
pub(crate) struct NextRegisters {
    vm: u64,
    first: u32,
}

impl Service {
    /// The registers of a target's vCPUs, a page of them. The audit log has pages that follow each
    /// other once; `next` is the connection's.
    pub(crate) fn registers(
        &self,
        peer: Credentials,
        target: &str,
        first: u32,
        next: &mut Option<Box<NextRegisters>>,
    ) -> Result<Answer, CallError> {
        let (vm, questions) = self.asked(target)?;
        let (vcpus, more) = questions.registers(first, PAGE).map_err(refuse)?;
        let follows = next.take().is_some_and(|next| next.vm == vm.id() && next.first == first);
        if !follows {
            self.broker().audit().write(Event::Registers { vm: &vm, by: peer });
        }
        // At most a page of them.
        let after = first.checked_add(u32::try_from(vcpus.len()).unwrap_or(PAGE));
        *next = after.filter(|_| more).map(|first| Box::new(NextRegisters { vm: vm.id(), first }));
        Ok(Answer::Registers { vcpus, more })
    }

    /// Stops a target for a connection that holds `held`, or checks that it is still stopped.
    ///
    /// # Errors
    /// Where there is no such target or its VMM cannot be asked. Where `held` cannot be relied on
    /// any more, it is ended.
    pub(crate) fn pause(
        &self,
        peer: Credentials,
        target: &str,
        held: &mut Option<VmPause>,
    ) -> Result<Answer, CallError> {
        self.end_if_gone(peer, held);
        if let Some(VmPause { vm, pause }) = held {
            if self.broker().find(target)?.id() != vm.id() {
                let message = "this connection has paused another VM: resume that one first";
                return Err(CallError::new(Refusal::Limit, message));
            }
            let checked = pause.check();
            match &checked {
                // A busy VMM was not asked: the pause still holds.
                Ok(_) | Err(AskError::Busy) => {}
                Err(AskError::Resumed) => self.resumed(peer, held, "the VM runs again"),
                Err(_) => self.resumed(peer, held, "it could not be checked"),
            }
            let was_running = checked.map_err(refuse)?;
            return Ok(Answer::Paused { was_running });
        }
        let (vm, questions) = self.asked(target)?;
        let (pause, was_running) = questions.pause().map_err(refuse)?;
        self.broker().audit().write(Event::Paused { vm: &vm, was_running, by: peer });
        *held = Some(VmPause { vm, pause });
        Ok(Answer::Paused { was_running })
    }

    /// Ends a connection's pause.
    ///
    /// # Errors
    /// Where it has ended before, or is of another VM: that one stays paused.
    pub(crate) fn resume(
        &self,
        peer: Credentials,
        target: &str,
        held: &mut Option<VmPause>,
    ) -> Result<Answer, CallError> {
        self.end_if_gone(peer, held);
        let vm = self.broker().find(target)?;
        let VmPause { pause, .. } =
            held.take_if(|held| held.vm.id() == vm.id()).ok_or_else(|| {
                CallError::new(Refusal::Unknown, "this connection has not paused that VM")
            })?;
        let reason = "asked for";
        self.broker().audit().write(Event::Resumed { vm: &vm, reason, by: peer });
        pause.end().map_err(refuse)?;
        Ok(Answer::Done)
    }

    /// Ends a connection's pause, if it has one, for another reason.
    pub(crate) fn resumed(
        &self,
        peer: Credentials,
        held: &mut Option<VmPause>,
        reason: &'static str,
    ) {
        if let Some(VmPause { vm, .. }) = held.take() {
            self.broker().audit().write(Event::Resumed { vm: &vm, reason, by: peer });
        }
    }

    fn end_if_gone(&self, peer: Credentials, held: &mut Option<VmPause>) {
        if held.as_ref().is_some_and(|held| self.broker().vm(held.vm.id()).is_none()) {
            self.resumed(peer, held, "the VM is gone");
        }
    }

    /// A target, and what its VMM can be asked.
    fn asked(&self, target: &str) -> Result<(Arc<Vm>, Questions), CallError> {
        let vm = self.broker().find(target)?;
        let without = || {
            let name = &vm.identity().name;
            let quoted = format!("'{}'", name.replace('\'', r"'\''"));
            let remedy = if self.external().vms().contains(&vm.id()) {
                format!(
                    "for a VM under QEMU: kvmmem target remove {quoted}, then kvmmem target add --qmp SOCKET --name {quoted}, \
                     which ends its views"
                )
            } else {
                "a VM under QEMU has that connection if it was added with `kvmmem target add --qmp SOCKET`, or is named \
                 `--target qmp:SOCKET` where no broker runs; a VM of `kvmmem vm` answers if it was started by a kvmmem of this \
                 version"
                    .to_owned()
            };
            let message = format!(
                "the broker has no QMP connection to {name:?} and its VMM does not answer questions about vCPUs, which registers \
                 and pauses need; {remedy}"
            );
            CallError::new(Refusal::Unsupported, message)
        };
        let by_vmm = || -> Option<Questions> {
            let peer = vm.peer();
            peer.vcpu_questions().is_answering().then(|| Questions::new(Arc::<Peer>::clone(peer)))
        };
        let questions = self.external().questions(vm.id()).or_else(by_vmm).ok_or_else(without)?;
        Ok((vm, questions))
    }
}

fn refuse(error: AskError) -> CallError {
    let refusal = match error {
        AskError::Busy => Refusal::Busy,
        AskError::Resumed => Refusal::Unknown,
        AskError::NoConnection
        | AskError::Silent
        | AskError::Deaf
        | AskError::Failed(_)
        | AskError::Nonsense
        | AskError::Qmp(_)
        | AskError::Watcher(_) => Refusal::Unsupported,
    };
    CallError::from_error(refusal, &error)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use kvmmem_proto::message::{VcpuAnswer, VcpuQuestion};
    use kvmmem_qemu::questions::{Ask, Reply};

    use super::*;
    use crate::core::limits::Limits;
    use crate::test_peer::Connection;

    /// A VMM that has too many questions at times.
    #[derive(Debug, Default)]
    struct Vmm {
        is_busy: AtomicBool,
        runs: AtomicBool,
    }

    impl Ask for Vmm {
        fn put(&self, question: VcpuQuestion, reply: Option<Reply>) -> Result<(), AskError> {
            if self.is_busy.load(Ordering::Relaxed) {
                return Err(AskError::Busy);
            }
            let runs = matches!(question, VcpuQuestion::Resume { .. });
            self.runs.store(runs, Ordering::Relaxed);
            reply.map(|reply| reply.send(Ok(VcpuAnswer::Paused { was_running: true })));
            Ok(())
        }
    }

    #[test]
    fn a_pause_lasts_while_the_vmm_has_too_many_questions() {
        let service = Arc::new(Service::new(Limits::default()));
        let mut tiger = Connection::new(&service, 0);
        tiger.register_target("tiger").unwrap();
        let vmm = Arc::new(Vmm::default());
        let (pause, _) = Questions::new(Arc::clone(&vmm) as Arc<dyn Ask>).pause().unwrap();
        let vm = service.broker().find("tiger").unwrap();
        let mut held = Some(VmPause { vm, pause });
        let mut pause = || {
            let by = Credentials { pid: 1, uid: 0 };
            service.pause(by, "tiger", &mut held).map_err(|refused| refused.refusal)
        };
        vmm.is_busy.store(true, Ordering::Relaxed);
        assert_eq!(pause().err(), Some(Refusal::Busy));
        vmm.is_busy.store(false, Ordering::Relaxed);
        assert!(matches!(pause(), Ok(Answer::Paused { was_running: true })));
        assert!(!vmm.runs.load(Ordering::Relaxed));
        drop(held);
        assert!(vmm.runs.load(Ordering::Relaxed));
    }
}

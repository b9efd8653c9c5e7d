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

impl Service {
    /// The registers of a target's vCPUs, a page of them.
    pub(crate) fn registers(
        &self,
        peer: Credentials,
        target: &str,
        first: u32,
    ) -> Result<Answer, CallError> {
        let (vm, questions) = self.asked(target)?;
        let (vcpus, more) = questions.registers(first, PAGE).map_err(refuse)?;
        if first == 0 {
            self.broker().audit().write(Event::Registers { vm: &vm, by: peer });
        }
        Ok(Answer::Registers { vcpus, more })
    }

    /// Stops a target for a connection that holds `held`, or checks that it is still stopped.
    ///
    /// # Errors
    /// Where there is no such target, its VMM cannot be asked, or the pause has ended; then nothing
    /// is held.
    pub(crate) fn pause(
        &self,
        peer: Credentials,
        target: &str,
        held: &mut Option<VmPause>,
    ) -> Result<Answer, CallError> {
        if let Some(VmPause { vm, pause }) = held {
            if self.broker().find(target)?.id() != vm.id() {
                let message = "this connection has paused another VM: resume that one first";
                return Err(CallError::new(Refusal::Limit, message));
            }
            let checked = pause.check().map_err(refuse);
            if checked.is_err() {
                *held = None;
            }
            return checked.map(|was_running| Answer::Paused { was_running });
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
    /// Where it has ended before.
    pub(crate) fn resume(
        &self,
        peer: Credentials,
        target: &str,
        held: Option<VmPause>,
    ) -> Result<Answer, CallError> {
        let vm = self.broker().find(target)?;
        let held = held.filter(|held| held.vm.id() == vm.id());
        let VmPause { pause, .. } = held.ok_or_else(|| {
            CallError::new(Refusal::Unknown, "this connection has not paused that VM")
        })?;
        let reason = "asked for";
        self.broker().audit().write(Event::Resumed { vm: &vm, reason, by: peer });
        pause.end().map_err(refuse)?;
        Ok(Answer::Done)
    }

    /// Ends the pause of a connection that has ended.
    pub(crate) fn resume_left(&self, peer: Credentials, held: Option<VmPause>) {
        if let Some(VmPause { vm, .. }) = held {
            let reason = "the connection ended";
            self.broker().audit().write(Event::Resumed { vm: &vm, reason, by: peer });
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

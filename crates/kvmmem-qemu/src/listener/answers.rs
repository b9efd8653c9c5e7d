// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Answers to what the broker's clients ask of a target's QEMU.

use std::sync::atomic::Ordering;

use kvmmem_proto::message::{VcpuAnswer, VcpuQuestion};

use super::Listener;
use crate::pause::Holders;
use crate::qmp::Qmp;
use crate::questions::{Ask, AskError, LIMIT, MAX_WAITING, Reply};

impl Ask for Listener {
    fn put(&self, question: VcpuQuestion, reply: Option<Reply>) -> Result<(), AskError> {
        let is_resume = matches!(question, VcpuQuestion::Resume { .. });
        let waiting = self.questions.fetch_add(1, Ordering::AcqRel);
        let done = if waiting >= MAX_WAITING && !is_resume {
            Err(AskError::Busy)
        } else {
            self.answer(question, reply)
        };
        self.questions.fetch_sub(1, Ordering::AcqRel);
        done
    }
}

impl Listener {
    fn answer(&self, question: VcpuQuestion, reply: Option<Reply>) -> Result<(), AskError> {
        if self.state().is_over {
            return Err(AskError::NoConnection);
        }
        let qmp = self.monitor.lend().map_err(|_| AskError::NoConnection)?;
        match reply {
            // A client that has given up waiting needs no answer.
            Some(reply) => drop(reply.send(self.ask_qemu(qmp, question))),
            None => self.answer_later(question),
        }
        Ok(())
    }

    fn ask_qemu(&self, qmp: Qmp, question: VcpuQuestion) -> Result<VcpuAnswer, AskError> {
        let mut qmp = qmp.within(LIMIT);
        let number = |number| usize::try_from(number).unwrap_or(usize::MAX);
        Ok(match question {
            VcpuQuestion::Registers { first, count } => {
                let (vcpus, more) = qmp.registers(number(first), number(count))?;
                VcpuAnswer::Registers { vcpus, more }
            }
            VcpuQuestion::Pause { holder, is_new } => VcpuAnswer::Paused {
                was_running: self.pause(|holders| holders.hold(&mut qmp, holder, is_new))?,
            },
            VcpuQuestion::Resume { holder } => {
                self.pause(|holders| holders.release(&mut qmp, holder))?;
                VcpuAnswer::Resumed
            }
        })
    }

    /// Begins or ends a pause. Where QEMU has not resumed the VM in time, it is asked again over a
    /// new connection.
    pub(super) fn pause<T>(
        &self,
        act: impl FnOnce(&mut Holders) -> Result<T, AskError>,
    ) -> Result<T, AskError> {
        let mut holders = self.holders();
        let done = act(&mut holders);
        if done.is_err() && holders.owes() {
            self.monitor.reconnect();
        }
        done
    }

    /// Asks QEMU by a job: it may take its time. Where there is no thread for the end of a pause,
    /// the watcher ends it.
    fn answer_later(&self, question: VcpuQuestion) {
        let Some(me) = self.me.upgrade() else { return };
        let _ = (self.run)(Box::new(move || {
            if let Ok(qmp) = me.monitor.lend() {
                let _ = me.ask_qemu(qmp, question);
            }
        }));
    }
}

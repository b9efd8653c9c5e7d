// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Questions about vCPUs to a VMM that has registered its VM by itself, over the connection that
//! registered it.
//!
//! The VMM may not answer, or answer what was not asked: a question waits for as long as its client
//! does, their number is limited, and a pause ends by itself in the VMM where it does not get to
//! know of its end.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

use kvmmem_proto::message::{FromBroker, VcpuAnswer, VcpuQuestion};
use kvmmem_proto::packet::PacketError;
use kvmmem_qemu::questions::{AskError, LIMIT, MAX_WAITING, Question};

use crate::sync::lock;

/// How much of a VMM's message is repeated, characters.
const MAX_MESSAGE: usize = 200;

/// The questions that wait for a VMM's answer.
#[derive(Debug, Default)]
pub(crate) struct VmmQuestions(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: u64,
    /// By number, with the time when it was sent.
    waiting: BTreeMap<u64, (Instant, Question)>,
    is_closed: bool,
}

impl VmmQuestions {
    /// The VMM's answer. One to a question that does not wait is dropped.
    pub(crate) fn answer(&self, id: u64, answer: VcpuAnswer) {
        let Some((_, question)) = lock(&self.0).waiting.remove(&id) else { return };
        // A client that has given up waiting needs no answer.
        match (question, answer) {
            (
                Question::Registers { count, reply, .. },
                VcpuAnswer::Registers { mut vcpus, more },
            ) => {
                vcpus.truncate(count);
                let _ = reply.send(Ok((vcpus, more)));
            }
            (Question::Pause { reply, .. }, VcpuAnswer::Paused { was_running }) => {
                let _ = reply.send(Ok(was_running));
            }
            (Question::Resume { reply, .. }, VcpuAnswer::Resumed) => {
                let _ = reply.map(|reply| reply.send(Ok(())));
            }
            (question, VcpuAnswer::NotPaused) => question.fail(AskError::Resumed),
            (question, VcpuAnswer::Failed { message }) => {
                let message =
                    message.chars().take(MAX_MESSAGE).flat_map(char::escape_debug).collect();
                question.fail(AskError::Failed(message));
            }
            (question, _) => question.fail(AskError::Nonsense),
        }
    }

    /// The connection has ended: no question is answered any more.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.0);
        state.is_closed = true;
        state.waiting.clear();
    }

    /// Puts a question to the VMM by way of `send`.
    ///
    /// # Errors
    /// Where too many wait, or the VMM does not read.
    pub(crate) fn ask(
        &self,
        question: Question,
        send: impl FnOnce(&FromBroker) -> Result<(), PacketError>,
    ) -> Result<(), AskError> {
        let sent = to_vmm(&question);
        let id = self.add(question)?;
        let sent = send(&FromBroker::AskVcpus { id, question: sent });
        sent.map_err(|_| {
            lock(&self.0).waiting.remove(&id);
            AskError::Deaf
        })
    }

    /// Adds a question, and returns its number.
    fn add(&self, question: Question) -> Result<u64, AskError> {
        let mut state = lock(&self.0);
        if state.is_closed {
            return Err(AskError::NoConnection);
        }
        state.waiting.retain(|_, (sent, _)| sent.elapsed() < LIMIT);
        if state.waiting.len() >= MAX_WAITING && !matches!(question, Question::Resume { .. }) {
            return Err(AskError::Busy);
        }
        state.last += 1;
        let id = state.last;
        state.waiting.insert(id, (Instant::now(), question));
        Ok(id)
    }
}

/// The question as it is sent.
fn to_vmm(question: &Question) -> VcpuQuestion {
    let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    match question {
        Question::Registers { first, count, .. } => {
            VcpuQuestion::Registers { first: number(*first), count: number(*count) }
        }
        Question::Pause { holder, is_new, .. } => {
            VcpuQuestion::Pause { holder: *holder, is_new: *is_new }
        }
        Question::Resume { holder, .. } => VcpuQuestion::Resume { holder: *holder },
    }
}

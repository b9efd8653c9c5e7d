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
use kvmmem_qemu::questions::{AskError, LIMIT, MAX_WAITING, Reply};

use crate::sync::lock;

/// The questions that wait for a VMM's answer.
#[derive(Debug, Default)]
pub(crate) struct VmmQuestions(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: u64,
    /// Where each answer goes, by the number of its question, with the time when that was sent.
    waiting: BTreeMap<u64, (Instant, Option<Reply>)>,
    /// Whether the VMM has said that it answers.
    is_answering: bool,
    is_closed: bool,
}

impl VmmQuestions {
    /// Records whether the VMM has said that it answers questions.
    pub(crate) fn set_answering(&self, is_answering: bool) {
        lock(&self.0).is_answering = is_answering;
    }

    /// Whether the VMM has said that it answers questions.
    pub(crate) fn is_answering(&self) -> bool {
        lock(&self.0).is_answering
    }

    /// The VMM's answer. One to a question that does not wait is dropped.
    pub(crate) fn answer(&self, id: u64, answer: VcpuAnswer) {
        if let Some((_, Some(reply))) = lock(&self.0).waiting.remove(&id) {
            // A client that has given up waiting needs no answer.
            let _ = reply.send(Ok(answer));
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
        question: VcpuQuestion,
        reply: Option<Reply>,
        send: impl FnOnce(&FromBroker) -> Result<(), PacketError>,
    ) -> Result<(), AskError> {
        let id = self.add(question, reply)?;
        let sent = send(&FromBroker::AskVcpus { id, question });
        sent.map_err(|_| {
            lock(&self.0).waiting.remove(&id);
            AskError::Deaf
        })
    }

    /// Adds a question, and returns its number.
    fn add(&self, question: VcpuQuestion, reply: Option<Reply>) -> Result<u64, AskError> {
        let mut state = lock(&self.0);
        if state.is_closed {
            return Err(AskError::NoConnection);
        }
        state.waiting.retain(|_, (sent, _)| sent.elapsed() < LIMIT);
        if state.waiting.len() >= MAX_WAITING && !matches!(question, VcpuQuestion::Resume { .. }) {
            return Err(AskError::Busy);
        }
        state.last += 1;
        let id = state.last;
        state.waiting.insert(id, (Instant::now(), reply));
        Ok(id)
    }
}

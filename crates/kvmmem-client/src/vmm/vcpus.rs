// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that has a VMM answer the broker's questions about its vCPUs.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{MutexGuard, PoisonError, Weak};
use std::time::Duration;

use kvmmem_proto::message::{Call, VcpuAnswer, VcpuQuestion};

use super::{Shared, State};

/// The most questions that wait; a broker asks fewer.
const MAX_WAITING: usize = 1024;

/// What answers for a VM's vCPUs. Called from one thread of the link's own.
pub trait Vcpus: Send + Sync {
    /// Answers a question of the broker's. May take a few seconds.
    fn answer(&self, question: VcpuQuestion) -> VcpuAnswer;

    /// Ends all pauses: the connection to the broker has ended.
    fn resume_all(&self);

    /// Ends the pauses that were not repeated in time; returns when to call this again.
    fn expire(&self) -> Option<Duration>;
}

/// The questions that wait, and what answers them.
#[derive(Default)]
pub(super) struct Questions {
    waiting: VecDeque<(u64, VcpuQuestion)>,
    handler: Option<Weak<dyn Vcpus>>,
    /// Whether [`Vcpus::resume_all`] is to be called.
    is_lost: bool,
}

impl fmt::Debug for Questions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Questions").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

impl Questions {
    pub(super) fn set_handler(&mut self, handler: Weak<dyn Vcpus>) {
        self.handler = Some(handler);
    }

    pub(super) fn push(&mut self, id: u64, question: VcpuQuestion) {
        if self.waiting.len() < MAX_WAITING {
            self.waiting.push_back((id, question));
        }
    }

    /// What waits is void, and all pauses end.
    pub(super) fn lost(&mut self) {
        self.waiting.clear();
        self.is_lost = true;
    }
}

/// Answers questions until the link is dropped.
pub(super) fn run(shared: &Shared) {
    let mut next_expiry = None;
    loop {
        let mut state = wait(shared, next_expiry);
        let handler = state.vcpus.handler.clone().and_then(|handler| handler.upgrade());
        let is_lost = std::mem::take(&mut state.vcpus.is_lost) || state.stopped;
        let question = if is_lost { None } else { state.vcpus.waiting.pop_front() };
        let (connection, stopped) = (state.lost, state.stopped);
        drop(state);
        if let Some(handler) = handler.as_ref().filter(|_| is_lost) {
            handler.resume_all();
        }
        if stopped {
            return;
        }
        if let Some((id, question)) = question {
            let failed =
                || VcpuAnswer::Failed { message: "the VM is starting or ending; try again".into() };
            let answer = handler.as_ref().map_or_else(failed, |handler| handler.answer(question));
            // The numbers of the next connection's questions start anew.
            if shared.lock().lost == connection {
                shared.outbox.push(Call::VcpuAnswer { id, answer });
                shared.flush();
            }
        }
        next_expiry = handler.and_then(|handler| handler.expire());
    }
}

/// Waits for something to do, at most for so long.
fn wait(shared: &Shared, limit: Option<Duration>) -> MutexGuard<'_, State> {
    let is_idle = |state: &mut State| {
        !state.stopped && !state.vcpus.is_lost && state.vcpus.waiting.is_empty()
    };
    let state = shared.lock();
    match limit {
        None => shared.changed.wait_while(state, is_idle).unwrap_or_else(PoisonError::into_inner),
        Some(limit) => {
            shared
                .changed
                .wait_timeout_while(state, limit, is_idle)
                .unwrap_or_else(PoisonError::into_inner)
                .0
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that has a VMM answer the broker's questions about its vCPUs.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use kvmmem_proto::message::{Call, VcpuAnswer};

use super::state::{Shared, State};

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
    let limit = limit.unwrap_or(Duration::MAX);
    let waited = shared.changed.wait_timeout_while(shared.lock(), limit, is_idle);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that tells a VMM of what happens to its views.

use std::sync::PoisonError;

use super::events::Event;
use super::state::Shared;

/// Tells events until the link is dropped.
pub(super) fn run(shared: &Shared) {
    loop {
        let state = shared.lock();
        let mut state = shared
            .changed
            .wait_while(state, |state| !state.stopped && state.events.waiting.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            return;
        }
        let Some(event) = state.events.waiting.pop_front() else { continue };
        let handler = state.events.handler.clone().and_then(|handler| handler.upgrade());
        let changed = match event {
            Event::Changed(target) => state.cache.target(target),
            _ => None,
        };
        drop(state);
        if let Some(handler) = handler {
            match event {
                Event::Revoke(grant) => {
                    if handler.revoke(grant) {
                        shared.revoked(grant);
                    }
                }
                Event::Gone(target) => handler.gone(target),
                Event::Changed(_) => {
                    if let Some(target) = changed {
                        handler.changed(&target);
                    }
                }
                Event::Lost => handler.lost(),
            }
        }
        if event == Event::Lost {
            shared.lock().events.is_losing = false;
            shared.changed.notify_all();
        }
    }
}

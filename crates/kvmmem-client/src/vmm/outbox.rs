// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Calls that are not answered, on their way to the broker.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvmmem_proto::message::{Call, Request};
use kvmmem_proto::packet::{PacketSocket, Wait};

/// From so many on, calls that only tell counters are left out.
const LONG: usize = 1024;

/// A queue that is emptied in its order. What is in it was caused by the broker's own answers and
/// pushes, at most one call for each, but for counters and changes of RAM.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    calls: Mutex<VecDeque<Call>>,
    /// Held while sending: what is taken out is sent before what follows it.
    sending: Mutex<()>,
}

impl Outbox {
    pub(super) fn push(&self, call: Call) {
        let mut calls = self.calls();
        let replaced = match &call {
            Call::Counters { .. } if calls.len() >= LONG => return,
            // The last one says all.
            Call::RamChanged { .. } => {
                calls.iter().position(|call| matches!(call, Call::RamChanged { .. }))
            }
            _ => None,
        };
        if let Some(index) = replaced {
            calls.remove(index);
        }
        calls.push_back(call);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.calls().is_empty()
    }

    /// Drops what was meant for the broker before; the next one is sent `first` before all else.
    pub(super) fn restart(&self, first: Option<Call>) {
        // A call that is being sent is put back where that fails.
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        *self.calls() = first.into_iter().collect();
    }

    /// Sends what waits, and then `last`, all in order. A broker that does not read is not waited
    /// for: the rest stays, and `last` is not sent. Whether everything was sent.
    pub(super) fn flush(&self, socket: &PacketSocket, last: Option<&Request>) -> bool {
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let Some(call) = self.calls().pop_front() else { break };
            let request = Request { id: 0, call };
            if socket.send(&request, &[], Wait::No).is_err() {
                self.calls().push_front(request.call);
                return false;
            }
        }
        last.is_none_or(|request| socket.send(request, &[], Wait::No).is_ok())
    }

    fn calls(&self) -> MutexGuard<'_, VecDeque<Call>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

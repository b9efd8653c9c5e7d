// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a listener does about events, in jobs that may wait.

use std::time::Instant;

use super::{GATHER, Listener, ListenerAction, VmEvent, Work, lock};
use crate::qmp::QmpError;

impl Listener {
    /// Has done what is to be done, unless that is under way; returns when to try again.
    pub(super) fn work(&self) -> Option<Instant> {
        let mut state = self.state();
        if state.is_working || state.work == Work::default() {
            return None;
        }
        let now = Instant::now();
        if state.gather > now && !state.work.close {
            return Some(state.gather);
        }
        let me = self.me.upgrade()?;
        state.is_working = true;
        drop(state);
        if (self.run)(Box::new(move || me.work_once())).is_ok() {
            return None;
        }
        self.state().is_working = false;
        Some(now + GATHER)
    }

    fn work_once(&self) {
        let work = std::mem::take(&mut self.state().work);
        match self.carry_out(work) {
            Ok(ListenerAction::Listen) => {}
            Ok(ListenerAction::Stop) => return self.end(),
            Ok(ListenerAction::Reconnect) => self.monitor.reconnect(),
            Err(error) => {
                tracing::debug!(%error, "QEMU does not answer");
                // Where it is lost already this does nothing.
                self.monitor.reconnect();
            }
        }
        let mut state = self.state();
        (state.is_working, state.gather) = (false, Instant::now() + GATHER);
        drop(state);
        (self.wake)();
    }

    fn carry_out(&self, work: Work) -> Result<ListenerAction, QmpError> {
        if work.close {
            return Ok(ListenerAction::Stop);
        }
        if work.lost {
            self.holders().lost();
        }
        let mut handle = lock(&self.handle);
        // First, and without QEMU, which may be lost by now: no later event stands for it.
        if work.reset {
            match handle(VmEvent::Reset) {
                ListenerAction::Listen => {}
                next => return Ok(next),
            }
        }
        if work.memory || work.found {
            let mut qmp = self.monitor.lend()?;
            if work.found {
                self.holders().reconnected(&mut qmp);
                // Before the layout, so that memory which is plugged in between is noticed later.
                let memory = qmp.memory_size()?;
                self.state().memory = Some(memory);
            }
            match handle(VmEvent::Memory(&mut qmp)) {
                ListenerAction::Listen => {}
                next => return Ok(next),
            }
        }
        if work.left {
            return Ok(handle(VmEvent::Left));
        }
        if work.found {
            self.state().ask = Some(Instant::now());
            (self.wake)();
        }
        Ok(ListenerAction::Listen)
    }

    fn end(&self) {
        let mut qmp = self.monitor.lend();
        // Not limited: each comes of a pause by an operator, and names another VM.
        if self.holders().close(qmp.as_mut().ok()) {
            tracing::error!(
                qmp = ?self.monitor.path(),
                "a client has paused the VM at this QMP socket, and its QEMU does not answer; if QEMU still runs, resume the \
                 VM: connect to the socket, send qmp_capabilities and then cont"
            );
        }
        drop(qmp);
        self.monitor.unsubscribe(&self.subscriber());
        self.state().is_over = true;
        (self.wake)();
    }
}

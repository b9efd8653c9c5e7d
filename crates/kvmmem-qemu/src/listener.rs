// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the QEMU of a target reports over its [`Monitor`]: resets, memory that was plugged in or
//! out, the end of a migration. It also answers the questions of the broker's clients.
//!
//! No thread belongs to it. Its owner waits for [`Listener::socket`] and calls [`Listener::step`]
//! when that is readable, at the time that the last step returned, and when `wake` was called;
//! until a step says that it is over. A step never waits: what asks QEMU step by step, as where the
//! RAM is after a change, is a job on another thread ([`Run`]). A QEMU that hangs, floods or lies
//! delays no other VM.

mod answers;
mod socket;
mod work;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use crate::monitor::{Counts, Monitor, MonitorEvent, Run, Step, Subscriber};
use crate::pause::Holders;
use crate::qmp::Qmp;
use crate::qmp::questions::MemorySize;
pub use socket::Socket;

/// How often QEMU is asked for its status and memory size, also while it floods events.
const IDLE: Duration = Duration::from_secs(10);

/// How often it is asked whether a migration is over.
const MIGRATING: Duration = Duration::from_millis(50);

/// How long what it reports is gathered before more is handled.
const GATHER: Duration = Duration::from_millis(50);

/// The longest pause between two attempts to connect.
const AGAIN_AT_LAST: Duration = Duration::from_secs(60);

/// What a target's QEMU has reported.
#[derive(Debug)]
pub enum VmEvent<'q> {
    /// The guest was reset.
    Reset,
    /// Memory may have been plugged in or out, or the connection is a new one: QEMU can be asked.
    Memory(&'q mut Qmp),
    /// The VM has migrated: this QEMU does not run it any more.
    Left,
}

/// What a listener does after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerAction {
    /// Listen on.
    Listen,
    /// Connect anew.
    Reconnect,
    /// Stop listening.
    Stop,
}

/// Handles an event; on a thread that may wait.
type Handle = dyn FnMut(VmEvent<'_>) -> ListenerAction + Send;

/// What is read of the answer to `query-status`.
#[derive(Deserialize)]
struct StatusAnswer {
    status: String,
}

/// A target's monitor, until [`Listener::close`].
pub struct Listener {
    me: Weak<Self>,
    monitor: Arc<Monitor>,
    state: Mutex<State>,
    /// Used by the job that asks QEMU. There is one at a time.
    handle: Mutex<Box<Handle>>,
    /// The pause of the VM, where there is one.
    holders: Mutex<Holders>,
    /// How many questions wait.
    questions: AtomicUsize,
    run: Arc<Run>,
    /// Has the owner step.
    wake: Box<dyn Fn() + Send + Sync>,
}

/// What is to be done, and how far it is.
#[derive(Debug)]
struct State {
    work: Work,
    /// Whether a job is at it.
    is_working: bool,
    /// When the next job may begin: what is reported until then is handled at once.
    gather: Instant,
    /// The memory size as it was last.
    memory: Option<MemorySize>,
    /// When to ask for memory size and status; `None` while QEMU is asked, or there is no
    /// connection.
    ask: Option<Instant>,
    is_over: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Work {
    lost: bool,
    found: bool,
    reset: bool,
    memory: bool,
    left: bool,
    close: bool,
}

impl Listener {
    /// Listens to a monitor. `find` connects where the connection is lost; `handle` gets each event.
    /// Both are jobs of `run`, which may wait. `wake` is called when a step is due earlier than the
    /// last one has returned. A pause that no client has asked for again for `silence` ends.
    pub fn new(
        monitor: Arc<Monitor>,
        find: impl Fn() -> Option<Qmp> + Send + Sync + 'static,
        handle: impl FnMut(VmEvent<'_>) -> ListenerAction + Send + 'static,
        silence: Duration,
        run: Arc<Run>,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        let state = State {
            work: Work::default(),
            is_working: false,
            gather: Instant::now(),
            memory: None,
            ask: None,
            is_over: false,
        };
        let listener = Arc::new_cyclic(|me: &Weak<Self>| Self {
            me: Weak::clone(me),
            monitor,
            state: Mutex::new(state),
            handle: Mutex::new(Box::new(handle)),
            holders: Mutex::new(Holders::new(silence)),
            questions: AtomicUsize::new(0),
            run: Arc::clone(&run),
            wake: Box::new(wake),
        });
        listener.monitor.subscribe(listener.subscriber(), find, AGAIN_AT_LAST, run);
        // From here on the listener receives Found and Lost.
        let mut state = listener.state();
        state.work.found |= listener.monitor.is_up();
        drop(state);
        listener
    }

    /// The socket to wait for, to be read; `None` while there is no connection.
    pub fn socket(&self) -> Option<Arc<OwnedFd>> {
        self.monitor.socket()
    }

    /// Does what is due; `None` once it is over.
    pub fn step(&self) -> Option<Step> {
        let step = self.monitor.step();
        let mut state = self.state();
        if state.is_over {
            return None;
        }
        if state.ask.is_some_and(|ask| ask <= Instant::now()) {
            state.ask = None;
            drop(state);
            self.ask();
            state = self.state();
        }
        let ask = state.ask;
        drop(state);
        let until = [step.until, self.monitor.due(), ask, self.work()].into_iter().flatten().min();
        Some(Step { until, ..step })
    }

    /// Resumes the VM, if it is paused, and ends; the owner steps until then.
    pub fn close(&self) {
        self.add(|work| work.close = true);
    }

    /// Asks for the memory size, as QEMU has no event for a DIMM that was plugged in, and for the
    /// status, as it reports the end of a migration only to a manager that asked for events.
    fn ask(&self) {
        let (me, none) = (Weak::clone(&self.me), json!({}));
        self.monitor.send("query-memory-size-summary", &none, move |answer| {
            if let (Some(me), Ok(answer)) = (me.upgrade(), answer) {
                me.take_memory_size(&answer);
            }
        });
        let me = Weak::clone(&self.me);
        self.monitor.send("query-status", &none, move |answer| {
            if let (Some(me), Ok(answer)) = (me.upgrade(), answer) {
                me.take_status(&answer);
            }
        });
    }

    fn take_memory_size(&self, answer: &RawValue) {
        let Ok(size) = serde_json::from_str::<MemorySize>(answer.get()) else {
            return self.monitor.reconnect();
        };
        let former = self.state().memory.replace(size);
        if former.is_some_and(|former| former != size) {
            self.add(|work| work.memory = true);
        }
    }

    fn take_status(&self, answer: &RawValue) {
        let answer: Option<StatusAnswer> = serde_json::from_str(answer.get()).ok();
        let pause = match answer.as_ref().map(|answer| &*answer.status) {
            Some("postmigrate") => return self.add(|work| work.left = true),
            Some("finish-migrate") => MIGRATING,
            _ => IDLE,
        };
        self.state().ask = Some(Instant::now() + pause);
        (self.wake)();
    }

    fn add(&self, what: impl FnOnce(&mut Work)) {
        what(&mut self.state().work);
        (self.wake)();
    }

    fn subscriber(&self) -> Weak<dyn Subscriber> {
        Weak::clone(&self.me) as Weak<dyn Subscriber>
    }

    fn holders(&self) -> MutexGuard<'_, Holders> {
        lock(&self.holders)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Subscriber for Listener {
    fn notify(&self, event: &MonitorEvent, _counts: Counts) {
        let mut state = self.state();
        match event {
            MonitorEvent::Lost => {
                state.work.lost = true;
                (state.work.found, state.ask) = (false, None);
            }
            MonitorEvent::Found => state.work.found = true,
            MonitorEvent::Qmp(event) => match event.name.as_str() {
                "RESET" => state.work.reset = true,
                // The guest has taken a DIMM, or a device has left.
                "ACPI_DEVICE_OST" | "DEVICE_DELETED" | "MEMORY_DEVICE_SIZE_CHANGE" => {
                    state.work.memory = true;
                }
                "STOP" => state.ask = state.ask.map(|ask| ask.min(Instant::now())),
                _ => return,
            },
        }
        drop(state);
        (self.wake)();
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("monitor", &self.monitor).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

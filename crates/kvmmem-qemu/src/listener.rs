// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the QEMU of a target reports over its [`Monitor`]: resets, memory that was plugged in or
//! out, the end of a migration. It also answers the questions of the broker's clients.
//!
//! No thread belongs to it. Its owner waits for [`Listener::socket`] and calls [`Listener::step`]
//! when that is readable, at the time that the last step returned, and when `wake` was called;
//! until a step says that it is over. A step never waits: what asks QEMU step by step, as where the
//! RAM is after a change, is a job on another thread ([`Run`]). A QEMU that hangs, floods or lies
//! delays no other VM.

#[cfg(test)]
mod thread;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::monitor::{Counts, Monitor, MonitorEvent, Run, Step, Subscriber};
use crate::pause::Stopped;
use crate::qmp::{MemorySize, Qmp, QmpError};
use crate::questions::{Ask, AskError, LIMIT, MAX_WAITING, Question};

/// How often QEMU is asked for its status and memory size, also while it floods events.
const IDLE: Duration = Duration::from_secs(10);

/// How often it is asked whether a migration is over.
const MIGRATING: Duration = Duration::from_millis(50);

/// How long what it reports is gathered before more is handled.
const GATHER: Duration = Duration::from_millis(50);

/// The longest pause between two attempts to connect.
const AGAIN_AT_LAST: Duration = Duration::from_secs(60);

/// Where a target's monitor is.
#[derive(Debug)]
pub struct Socket {
    /// Where it is.
    pub path: PathBuf,
    /// The process that listened when the VM was added: the VMM, or what has handed it the socket.
    /// `None` where it is not known.
    pub listener: Option<u32>,
    /// The connection, where there is one.
    pub qmp: Option<Qmp>,
}

impl Socket {
    /// The one of a connection, without it.
    pub fn of(qmp: &Qmp) -> Self {
        Self { path: qmp.path().to_owned(), listener: qmp.listener(), qmp: None }
    }
}

impl From<Qmp> for Socket {
    fn from(qmp: Qmp) -> Self {
        let socket = Self::of(&qmp);
        Self { qmp: Some(qmp), ..socket }
    }
}

/// What a target's QEMU has reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// The guest was reset.
    Reset,
    /// Memory may have been plugged in or out, or the connection is a new one.
    Memory,
    /// The VM has migrated: this QEMU does not run it any more.
    Left,
}

/// What is done about news.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Listen on.
    Listen,
    /// Connect anew.
    Reconnect,
    /// The VM is no more listened to.
    Stop,
}

/// Is told each news, and may ask QEMU about it; on a thread that may wait.
type Tell = dyn FnMut(&mut Qmp, News) -> Next + Send;

/// A target's monitor, until [`Listener::close`].
pub struct Listener {
    me: Weak<Self>,
    monitor: Arc<Monitor>,
    state: Mutex<State>,
    /// Of the job that asks QEMU, of which there is one at a time.
    tell: Mutex<Box<Tell>>,
    /// The pause of the VM, where there is one.
    stopped: Mutex<Stopped>,
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
    /// When to ask for memory size and status; `None` while QEMU is asked, or there is no connection.
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
    /// Listens to a monitor. `find` connects where the connection is lost; `tell` gets each change.
    /// Both are jobs of `run`, which may wait. `wake` is called when a step is due earlier than the
    /// last one has returned. A pause that no client has asked for again for `silence` ends.
    pub fn new(
        monitor: Arc<Monitor>,
        find: impl Fn() -> Option<Qmp> + Send + Sync + 'static,
        tell: impl FnMut(&mut Qmp, News) -> Next + Send + 'static,
        silence: Duration,
        run: Arc<Run>,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        let work = Work { found: monitor.is_up(), ..Work::default() };
        let state = State {
            work,
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
            tell: Mutex::new(Box::new(tell)),
            stopped: Mutex::new(Stopped::new(silence)),
            questions: AtomicUsize::new(0),
            run: Arc::clone(&run),
            wake: Box::new(wake),
        });
        listener.monitor.subscribe(listener.subscriber(), find, AGAIN_AT_LAST, run);
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
        let until = [step.until, ask, self.work()].into_iter().flatten().min();
        Some(Step { until, ..step })
    }

    /// Resumes the VM, if it is paused, and ends; the owner steps until then.
    pub fn close(&self) {
        self.add(|work| work.close = true);
    }

    /// Asks for the memory size, since that a DIMM was plugged in is no event, and for the status,
    /// since that a migration is over is none unless a manager has asked for one.
    fn ask(&self) {
        let (me, none) = (Weak::clone(&self.me), json!({}));
        self.monitor.send("query-memory-size-summary", &none, move |answer| {
            if let (Some(me), Ok(answer)) = (me.upgrade(), answer) {
                me.take_memory_size(answer);
            }
        });
        let me = Weak::clone(&self.me);
        self.monitor.send("query-status", &none, move |answer| {
            if let (Some(me), Ok(answer)) = (me.upgrade(), answer) {
                me.take_status(&answer);
            }
        });
    }

    fn take_memory_size(&self, answer: Value) {
        let Ok(size) = serde_json::from_value::<MemorySize>(answer) else {
            return self.monitor.reconnect();
        };
        let former = self.state().memory.replace(size);
        if former.is_some_and(|former| former != size) {
            self.add(|work| work.memory = true);
        }
    }

    fn take_status(&self, answer: &Value) {
        let pause = match answer.get("status").and_then(Value::as_str) {
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

    /// Has done what is to be done, unless that is under way; returns when to try again.
    fn work(&self) -> Option<Instant> {
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
            Ok(Next::Listen) => {}
            Ok(Next::Stop) => return self.end(),
            Ok(Next::Reconnect) => self.monitor.reconnect(),
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

    fn carry_out(&self, work: Work) -> Result<Next, QmpError> {
        if work.close {
            return Ok(Next::Stop);
        }
        if work.lost {
            self.stopped().lost();
        }
        let news = [
            work.reset.then_some(News::Reset),
            (work.memory || work.found).then_some(News::Memory),
            work.left.then_some(News::Left),
        ];
        if news.iter().all(Option::is_none) {
            return Ok(Next::Listen);
        }
        let mut qmp = self.monitor.lend()?;
        if work.found {
            self.stopped().reconnected(&mut qmp);
            // Before the layout, so that memory which is plugged in between is noticed later.
            let memory = qmp.memory_size()?;
            self.state().memory = Some(memory);
        }
        let mut tell = lock(&self.tell);
        for news in news.into_iter().flatten() {
            match tell(&mut qmp, news) {
                Next::Listen => {}
                next => return Ok(next),
            }
        }
        if work.found {
            self.state().ask = Some(Instant::now());
            (self.wake)();
        }
        Ok(Next::Listen)
    }

    fn end(&self) {
        if let Ok(mut qmp) = self.monitor.lend() {
            self.stopped().end(&mut qmp);
        }
        self.monitor.unsubscribe(&self.subscriber());
        self.state().is_over = true;
        (self.wake)();
    }

    fn subscriber(&self) -> Weak<dyn Subscriber> {
        Weak::clone(&self.me) as Weak<dyn Subscriber>
    }

    fn stopped(&self) -> MutexGuard<'_, Stopped> {
        lock(&self.stopped)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Subscriber for Listener {
    fn hear(&self, event: &MonitorEvent, _counts: Counts) {
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

impl Ask for Listener {
    fn put(&self, question: Question) -> Result<(), AskError> {
        let is_resume = matches!(question, Question::Resume { .. });
        let waiting = self.questions.fetch_add(1, Ordering::AcqRel);
        let done = if waiting >= MAX_WAITING && !is_resume {
            Err(AskError::Busy)
        } else {
            self.answer(question)
        };
        self.questions.fetch_sub(1, Ordering::AcqRel);
        done
    }
}

impl Listener {
    fn answer(&self, question: Question) -> Result<(), AskError> {
        if self.state().is_over {
            return Err(AskError::NoConnection);
        }
        let lent = || self.monitor.lend().map_err(|_| AskError::NoConnection);
        let mut qmp = lent()?.within(LIMIT);
        // Who has given up waiting needs no answer.
        match question {
            Question::Resume { holder, reply: None } => self.resume_later(holder),
            Question::Registers { first, count, reply } => {
                let _ = reply.send(qmp.registers(first, count).map_err(Into::into));
            }
            Question::Pause { holder, is_new, reply } => {
                let _ = reply.send(self.stopped().hold(&mut qmp, holder, is_new));
            }
            Question::Resume { holder, reply: Some(reply) } => {
                let _ = reply.send(self.stopped().release(&mut qmp, holder));
            }
        }
        Ok(())
    }

    /// Ends a pause by a job: QEMU may take its time. Where there is no thread for it the watcher
    /// ends the pause.
    fn resume_later(&self, holder: u64) {
        let Some(me) = self.me.upgrade() else { return };
        let _ = (self.run)(Box::new(move || {
            if let Ok(qmp) = me.monitor.lend() {
                let _ = me.stopped().release(&mut qmp.within(LIMIT), holder);
            }
        }));
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

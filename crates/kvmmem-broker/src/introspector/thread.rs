// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one thread of an introspector: waits for its inbox, its QMP socket and its QEMU's end, and
//! ends views.
//!
//! It never waits for anything else, so that a QEMU that floods, answers slowly or not at all is
//! killed in time where the operator wants that.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use kvmmem_abi::native::STATE_GONE;
use kvmmem_qemu::monitor::{Step, Subscriber};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::end::{Cause, Verdict};
use super::handle::Introspector;
use super::inbox::Notice;
use super::list::Introspectors;
use super::unplug::{Progress, Unplugging};
use super::view::{Phase, View};
use crate::registry::Vm;
use crate::sync::lock;
use crate::workers::{Party, Workers};

/// How soon a view that is stuck is tried again: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How long a QEMU that sends more than one step takes is not listened to.
const FLOOD_PAUSE: Duration = Duration::from_millis(5);

/// The longest pause between two attempts to connect to QEMU again.
const AGAIN_AT_LAST: Duration = Duration::from_secs(5);

/// How long a QEMU that was killed may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(1);

/// How long the end of all views may take.
const CLOSE_LIMIT: Duration = Duration::from_millis(4500);

struct Thread {
    it: Arc<Introspector>,
    list: Weak<Introspectors>,
    unplugging: Vec<Unplugging>,
    verdicts: Vec<Verdict>,
    /// When stuck views are tried again.
    retry: Option<Instant>,
    /// The pause before the next attempt.
    pause: Duration,
    /// Until when a QEMU that was killed is waited for.
    killed: Option<Instant>,
    /// When this is over at the latest, once it ends.
    end: Option<Instant>,
}

/// Starts the thread; it ends by [`Notice::End`] or with QEMU.
pub(super) fn start(
    it: &Arc<Introspector>,
    list: &Arc<Introspectors>,
    workers: &Workers,
) -> std::io::Result<()> {
    workers.start()?;
    let inbox: Arc<dyn Subscriber> = Arc::clone(&it.inbox) as _;
    let qemu = it.qemu.clone();
    let (workers, party) = (workers.clone(), Party::Cid(it.cid()));
    let run = move |job| {
        workers.run(party, job);
        Ok(())
    };
    let connect = move || qemu.connect();
    it.monitor.subscribe(Arc::downgrade(&inbox), connect, AGAIN_AT_LAST, Arc::new(run));
    // What an earlier broker has left is tried at once.
    let retry = (!it.views().is_empty()).then(Instant::now);
    let mut thread = Thread {
        it: Arc::clone(it),
        list: Arc::downgrade(list),
        unplugging: Vec::new(),
        verdicts: Vec::new(),
        retry,
        pause: BACK_OFF.0,
        killed: None,
        end: None,
    };
    let spawned =
        std::thread::Builder::new().name("introspector".into()).spawn(move || thread.run());
    spawned.map(|_| ()).inspect_err(|_| it.monitor.unsubscribe(&Arc::downgrade(&inbox)))
}

impl Thread {
    fn run(&mut self) {
        loop {
            let step = self.it.monitor.step();
            for notice in self.it.inbox.take() {
                self.handle(notice);
            }
            let is_alive = self.it.is_alive();
            if !is_alive && self.end.is_none() {
                self.handle(Notice::End);
            }
            let now = Instant::now();
            let next = self.advance(is_alive, now);
            if self.is_over(is_alive, now) {
                break;
            }
            self.wait(step, next, is_alive);
        }
        let inbox: Arc<dyn Subscriber> = Arc::clone(&self.it.inbox) as _;
        self.it.monitor.unsubscribe(&Arc::downgrade(&inbox));
        match self.list.upgrade() {
            Some(list) => list.end(&self.it),
            None => self.it.end(),
        }
    }

    fn handle(&mut self, notice: Notice) {
        let now = Instant::now();
        match notice {
            Notice::Revoked(grant) => {
                lock(&self.it.state).unconfirmed.insert(grant);
                let mapped = self.it.mapped_by(grant);
                // Which pages of such a view are by this grant, only the guest knows.
                let is_mapped = |view: &View| Some(view.target) == mapped && view.lists_tokens();
                self.end_views(Cause::Revoked, |view| {
                    view.grant == grant || (is_mapped(view) && view.ends_by(grant))
                });
                // Now, or when the last of them is gone.
                self.it.confirm(grant);
            }
            Notice::Gone(target) => self.end_views(Cause::Gone, |view| view.target == target),
            Notice::Changed(target) => self.changed(target),
            Notice::Reset(resets) => {
                self.end_views(Cause::Reset, |view| is_whole(view) && view.since.resets < resets);
                self.it.use_again(resets);
            }
            Notice::Lost(losses) => {
                self.end_views(Cause::Lost, |view| is_whole(view) && view.since.losses < losses);
            }
            // What happened meanwhile was not reported.
            Notice::Found => self.retry = Some(now),
            Notice::Deleted(device) => self.deleted(&device),
            Notice::Closed(view) => self.unplugging.push(Unplugging::of(view, true, now)),
            Notice::Undo(view) => self.unplugging.push(Unplugging::undo(view, now)),
            Notice::End => {
                lock(&self.it.state).is_closed = true;
                self.end.get_or_insert(now + CLOSE_LIMIT);
                (self.retry, self.pause) = (None, BACK_OFF.0);
                self.end_views(Cause::Gone, |_| true);
            }
        }
    }

    /// Ends the views that `is_meant` picks.
    fn end_views(&mut self, cause: Cause, is_meant: impl Fn(&View) -> bool) {
        let now = Instant::now();
        for view in self.it.views().into_iter().filter(|view| is_meant(view)) {
            if view.claim(cause.state()) {
                view.announce(cause.state());
                let has_driver = cause != Cause::Reset;
                self.unplugging.push(Unplugging::of(Arc::clone(&view), has_driver, now));
            }
            if cause.is_binding() {
                self.verdicts.push(Verdict::new(view, cause, now));
            }
        }
    }

    fn changed(&mut self, target: u64) {
        let vm = self.it.link.target(target);
        let Some(layout) = vm.as_deref().and_then(Vm::ram).map(|ram| ram.layout()) else { return };
        for view in self.it.views().iter().filter(|view| view.target == target) {
            if view.is_unmoved(&layout) {
                view.refresh(layout.generation);
            }
        }
        self.end_views(Cause::Gone, |view| view.target == target && !view.is_unmoved(&layout));
    }

    /// A device that the guest has unplugged by itself takes its view along.
    fn deleted(&mut self, device: &str) {
        let views = self.it.views();
        let Some(view) = views.iter().find(|view| lock(&view.plug).device_is_gone(device)) else {
            return;
        };
        match view.phase() {
            Phase::Open => self.end_views(Cause::Reset, |other| std::ptr::eq(other, &**view)),
            // It fails then.
            Phase::Opening => drop(view.claim(STATE_GONE)),
            Phase::Ending | Phase::Stuck | Phase::Closed => {}
        }
    }

    /// Does what can be done now; returns when there is more to do.
    fn advance(&mut self, is_alive: bool, now: Instant) -> Option<Instant> {
        let mut next = Vec::new();
        self.try_again(now);
        for mut one in std::mem::take(&mut self.unplugging) {
            match one.advance(&self.it, is_alive, now) {
                Progress::Waits(until) => {
                    next.push(until);
                    self.unplugging.push(one);
                }
                Progress::Gone => {
                    self.it.forget(&one.view);
                    if self.it.views().iter().all(|view| view.phase() != Phase::Stuck) {
                        self.pause = BACK_OFF.0;
                    }
                }
                Progress::Stuck => self.stuck(&one.view, now),
            }
        }
        for verdict in std::mem::take(&mut self.verdicts) {
            if !is_alive || !verdict.view.is_reachable() {
                continue;
            }
            if !verdict.is_due(now) {
                next.push(verdict.at);
                self.verdicts.push(verdict);
            } else if self.it.punish(&verdict) {
                self.killed.get_or_insert(now + KILL_LIMIT);
            }
        }
        let is_killed = self.killed.filter(|_| is_alive);
        let tokens = self.it.tend_tokens(now);
        next.extend([self.retry, self.end, is_killed, tokens].into_iter().flatten());
        next.into_iter().min()
    }

    fn stuck(&mut self, view: &Arc<View>, now: Instant) {
        view.settle_stuck(lock(&view.plug).has_devices());
        let is_up = self.it.monitor.is_up();
        self.verdicts.iter_mut().for_each(|verdict| verdict.failed(view, is_up));
        self.retry.get_or_insert(now + self.pause);
        // What the guest has released is out of its reach, even if QEMU still has it.
        view.grants().into_iter().for_each(|grant| self.it.confirm(grant));
    }

    /// Tries to unplug what is stuck, once that is due.
    fn try_again(&mut self, now: Instant) {
        if self.retry.is_none_or(|retry| now < retry) {
            return;
        }
        self.retry = None;
        let stuck = self.it.views().into_iter().filter(|view| view.claim_stuck());
        let before = self.unplugging.len();
        self.unplugging.extend(stuck.map(|view| Unplugging::again(view, now)));
        let is_any = self.unplugging.len() > before;
        self.pause = if is_any { (self.pause * 2).min(BACK_OFF.1) } else { BACK_OFF.0 };
    }

    fn is_over(&self, is_alive: bool, now: Instant) -> bool {
        // QEMU still releases the memory of these: the guest has released their devices.
        let is_left = |view: &Arc<View>| view.phase() == Phase::Stuck && !view.is_reachable();
        let is_done = self.unplugging.is_empty()
            && self.verdicts.is_empty()
            && !(is_alive && self.it.monitor.is_up() && self.it.views().iter().any(is_left))
            && self.killed.is_none_or(|killed| !is_alive || killed <= now);
        self.end.is_some_and(|end| is_done || end <= now)
    }

    fn wait(&self, step: Step, next: Option<Instant>, is_alive: bool) {
        let now = Instant::now();
        let left = |until: Instant| until.saturating_duration_since(now);
        // What was sent since the step has a limit too.
        let due = self.it.monitor.due();
        let mut limit = [step.until, due, next].into_iter().flatten().min().map(left);
        let mut socket: Option<Arc<OwnedFd>> = self.it.monitor.socket();
        if step.is_behind {
            socket = None;
            limit = Some(limit.unwrap_or(FLOOD_PAUSE).min(FLOOD_PAUSE));
        }
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut fds = vec![PollFd::new(&*self.it.inbox, PollFlags::IN)];
        fds.extend(socket.as_deref().map(|socket| PollFd::new(socket, PollFlags::IN)));
        let pidfd = self.it.process.pidfd();
        fds.extend(is_alive.then(|| PollFd::from_borrowed_fd(pidfd, PollFlags::IN)));
        // An interrupted wait is a short one. No other failure is possible but for want of memory.
        let _ = rustix::event::poll(&mut fds, limit.as_ref());
    }
}

/// Whether nothing has ended the view yet.
fn is_whole(view: &View) -> bool {
    matches!(view.phase(), Phase::Opening | Phase::Open)
}

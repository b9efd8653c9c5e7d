// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ends views: the guest's driver is told, the devices are unplugged, QEMU lets go of the memory.
//!
//! The driver is asked first, so that its processes learn why. That the guest reaches nothing any more is not its word,
//! though, but QEMU's: the devices are deleted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_abi::native::{STATE_GONE, STATE_REVOKED};

use super::Introspector;
use super::view::{Phase, View, lock};
use crate::limit::RateLimit;
use crate::wire::{OnSilence, ViewCounters};

/// How long the driver may take to part its processes from the memory.
const SEEN_LIMIT: Duration = Duration::from_secs(1);

/// How long the guest may take in all until it has let go of the devices. The broker waits for 2 s for a revocation to be
/// confirmed, and a QEMU that has to be killed needs its part of that.
const END_LIMIT: Duration = Duration::from_millis(1300);

/// How long QEMU is waited for to let go of the memory, which it does when all its threads have; what it has not by then
/// is tried again later.
const OBJECT_LIMIT: Duration = Duration::from_millis(100);

/// How soon that is tried again.
const OBJECT_RETRY: Duration = Duration::from_millis(2);

/// How long a QEMU that does not answer any more may take to do so again, or to end.
const FOUND_LIMIT: Duration = Duration::from_secs(2);

/// How soon it is looked whether it has ended.
const FOUND_LOOK: Duration = Duration::from_millis(10);

/// How long a QEMU that was killed may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(1);

/// How soon the descriptor is looked at again: the guest cannot signal a thing.
const LOOK: Duration = Duration::from_micros(500);

/// A guest can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(5);

/// Why views end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// Their grant was taken back.
    Revoked,
    /// The target or the broker is no longer there.
    Gone,
    /// Their tool has closed them.
    Closed,
    /// The introspector was reset, or has unplugged a device by itself: its driver has none of them any more.
    Reset,
    /// QEMU does not answer.
    Lost,
}

impl Cause {
    fn state(self) -> u32 {
        if self == Self::Revoked { STATE_REVOKED } else { STATE_GONE }
    }

    /// Whether the guest may not keep the memory: what the operator has said counts then. Else it has a right to it
    /// still, and is only being tidied up after.
    fn is_binding(self) -> bool {
        matches!(self, Self::Revoked | Self::Gone | Self::Lost)
    }

    fn words(self) -> &'static str {
        match self {
            Self::Revoked => "the grant was revoked",
            Self::Gone => "the target is gone",
            Self::Closed => "the tool has closed the view",
            Self::Reset => "the introspector was reset",
            Self::Lost => "QEMU does not answer at its QMP socket",
        }
    }
}

impl Introspector {
    /// Ends the views that `is_meant` picks; whether the guest reaches none of their memory any more.
    pub(super) fn end(&self, cause: Cause, is_meant: impl Fn(&View) -> bool) -> bool {
        let deadline = Instant::now() + END_LIMIT;
        let meant: Vec<Arc<View>> = self.views().into_iter().filter(|view| is_meant(view)).collect();
        let (mine, others): (Vec<_>, Vec<_>) = meant.into_iter().partition(|view| view.claim(cause.state()));
        self.take_back(&mine, cause);
        for view in &others {
            view.wait_settled(deadline);
        }
        let is_held = |view: &&Arc<View>| self.is_reachable(view);
        if cause == Cause::Lost && mine.iter().any(|view| is_held(&view)) {
            self.wait_found();
            self.try_again();
        }
        let held: Vec<&Arc<View>> = mine.iter().chain(&others).filter(is_held).collect();
        if held.is_empty() || !self.is_alive() {
            return true;
        }
        cause.is_binding() && self.punish(&held, cause)
    }

    /// Waits until a QEMU that was lost answers again, or has ended: it closes its sockets first.
    fn wait_found(&self) {
        let deadline = Instant::now() + FOUND_LIMIT;
        while Instant::now() < deadline && self.is_alive() && !self.monitor.wait_up(FOUND_LOOK) {}
    }

    /// Ends views that are the caller's to end.
    pub(super) fn take_back(&self, views: &[Arc<View>], cause: Cause) {
        if views.is_empty() {
            return;
        }
        let start = Instant::now();
        for view in views {
            view.announce(cause.state());
        }
        // After a reset there is no driver to look.
        if cause != Cause::Reset {
            let deadline = start + SEEN_LIMIT;
            while !views.iter().all(|view| view.is_seen()) && Instant::now() < deadline && self.is_alive() {
                std::thread::sleep(LOOK);
            }
        }
        self.unplug(views, start + END_LIMIT);
    }

    /// Unplugs views that are the caller's, as far as the guest and QEMU let it until the deadline.
    pub(super) fn unplug(&self, views: &[Arc<View>], deadline: Instant) {
        let mut devices = Vec::new();
        for view in views {
            let mut plug = lock(&view.plug);
            plug.unplug(&self.monitor);
            devices.extend(plug.devices(&self.monitor));
        }
        self.monitor.wait_deleted(&devices, deadline);
        let deadline = Instant::now() + OBJECT_LIMIT;
        let mut left: Vec<&Arc<View>> = views.iter().collect();
        loop {
            let is_alive = self.is_alive();
            left.retain(|view| {
                let mut plug = lock(&view.plug);
                plug.devices(&self.monitor);
                let is_done = plug.remove_objects(&self.monitor) || !is_alive;
                drop(plug);
                if is_done {
                    self.forget(view);
                }
                !is_done
            });
            let may_end = |view: &&Arc<View>| lock(&view.plug).devices(&self.monitor).is_empty();
            if !left.iter().any(may_end) || Instant::now() >= deadline {
                break;
            }
            std::thread::sleep(OBJECT_RETRY);
        }
        for view in left {
            view.settle(Phase::Stuck);
            self.monitor.nudge();
            // What the guest has let go of is out of its reach, whatever QEMU still has.
            self.confirm_late(view.grant);
        }
    }

    /// Whether the guest may still reach a view's memory.
    pub(super) fn is_reachable(&self, view: &View) -> bool {
        match view.phase() {
            Phase::Closed => false,
            // Somebody is at work on it, and holds the lock perhaps.
            Phase::Opening | Phase::Ending | Phase::Open => true,
            Phase::Stuck => self.is_alive() && !lock(&view.plug).devices(&self.monitor).is_empty(),
        }
    }

    /// Nothing is left of a view.
    fn forget(&self, view: &Arc<View>) {
        lock(&self.state).views.retain(|other| !Arc::ptr_eq(other, view));
        self.link.detached(view.number, ViewCounters::default());
        view.settle(Phase::Closed);
        self.confirm_late(view.grant);
    }

    /// Confirms a revocation that could not be confirmed in time.
    pub(super) fn confirm_late(&self, grant: u64) {
        let is_held = self.views().iter().any(|view| view.grant == grant && self.is_reachable(view));
        let mut state = lock(&self.state);
        if !is_held && state.unconfirmed.remove(&grant) {
            drop(state);
            self.link.revoked(grant);
        }
    }

    /// Does what the operator wants done where a guest keeps what it must not; whether it is out of reach then.
    fn punish(&self, held: &[&Arc<View>], cause: Cause) -> bool {
        let policy = self.traits.on_silence;
        for view in held {
            if let (Some(vm), false) = (self.vm(), view.number == 0) {
                self.audit(|audit| audit.silent(&vm, view.number, view.grant, policy, cause.words()));
            }
            if let Some(suppressed) = WARNINGS.allow(Instant::now()) {
                let (introspector, view) = (self.name(), view.number);
                tracing::warn!(
                    suppressed, introspector, view, cause = cause.words(), policy = %policy,
                    "an introspector's guest does not let go of a target's memory"
                );
            }
        }
        match policy {
            OnSilence::Report => false,
            OnSilence::Pause => {
                if let Err(error) = self.monitor.execute("stop", serde_json::json!({})) {
                    let error: &dyn std::error::Error = &error;
                    tracing::error!(introspector = self.name(), error, "cannot pause a silent introspector");
                }
                // Whoever lets it go on gives it the memory back.
                false
            }
            OnSilence::Kill => {
                if let Err(error) = self.process.kill() {
                    tracing::error!(introspector = self.name(), %error, "cannot kill a silent introspector");
                }
                self.process.wait(Instant::now() + KILL_LIMIT)
            }
        }
    }
}

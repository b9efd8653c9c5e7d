// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ends views: the guest's driver is told, the devices are unplugged, QEMU lets go of the memory.
//!
//! The driver is asked first, so that its processes learn why. That the guest reaches nothing any
//! more is not its word, though, but QEMU's: the devices are deleted.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use kvmmem_abi::native::{STATE_GONE, STATE_REVOKED};
use kvmmem_proto::limit::RateLimit;
use kvmmem_proto::message::OnSilence;

use super::Introspector;
use super::qmp_events::TRY_LIMIT;
use super::view::{Phase, View, lock};

/// How long the driver may take to part its processes from the memory.
const SEEN_LIMIT: Duration = Duration::from_secs(1);

/// How long the guest may take in all until it has let go of the devices. The broker waits for 2 s
/// for a revocation to be confirmed, and a QEMU that has to be killed needs its part of that.
const END_LIMIT: Duration = Duration::from_millis(1300);

/// How long views may take in all until it is looked at what is left of them, whether QEMU answers
/// or not.
const WORK_LIMIT: Duration = Duration::from_millis(1500);

/// How long a QEMU may take to pause.
const PAUSE_LIMIT: Duration = Duration::from_millis(300);

/// How long QEMU is waited for to let go of the memory, which it does when all its threads have;
/// what it has not by then is tried again later.
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
    /// The introspector was reset, or has unplugged a device by itself: its driver has none of them
    /// any more.
    Reset,
    /// QEMU does not answer.
    Lost,
}

impl Cause {
    fn state(self) -> u32 {
        if self == Self::Revoked { STATE_REVOKED } else { STATE_GONE }
    }

    /// Whether the guest may not keep the memory: what the operator has said counts then. Else it
    /// has a right to it still, and is only being tidied up after.
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
    /// Ends the views that `is_meant` picks; whether the guest reaches none of their memory any
    /// more.
    ///
    /// Returns in time, and applies the policy in time, also where QEMU floods events or does not
    /// answer: commands are sent by other threads, which continue where it is slow.
    pub(super) fn end(&self, cause: Cause, is_meant: impl Fn(&View) -> bool) -> bool {
        let start = Instant::now();
        let meant: Vec<Arc<View>> =
            self.views().into_iter().filter(|view| is_meant(view)).collect();
        let (mine, others): (Vec<_>, Vec<_>) =
            meant.into_iter().partition(|view| view.claim(cause.state()));
        for view in &mine {
            view.announce(cause.state());
        }
        if !mine.is_empty() {
            let views = mine.clone();
            let is_begun = self.within(start + WORK_LIMIT, move |it| {
                it.revoke_views(&views, cause, start + END_LIMIT)
            });
            if !is_begun {
                // No thread works on them: they are tried again later.
                mine.iter().for_each(|view| view.settle_stuck(true));
                self.monitor.nudge();
            }
        }
        for view in &others {
            view.wait_settled(start + END_LIMIT);
        }
        let is_held = |view: &&Arc<View>| self.is_reachable(view);
        if cause == Cause::Lost && mine.iter().any(|view| is_held(&view)) {
            self.wait_found();
            self.within(Instant::now() + TRY_LIMIT + 2 * OBJECT_LIMIT, Self::try_again);
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
    fn revoke_views(&self, views: &[Arc<View>], cause: Cause, end: Instant) {
        // After a reset there is no driver to look.
        if cause != Cause::Reset {
            let deadline = Instant::now() + SEEN_LIMIT;
            while !views.iter().all(|view| view.is_seen())
                && Instant::now() < deadline
                && self.is_alive()
            {
                std::thread::sleep(LOOK);
            }
        }
        self.unplug(views, end);
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
            view.settle_stuck(!lock(&view.plug).devices(&self.monitor).is_empty());
            self.monitor.nudge();
            // What the guest has let go of is out of its reach, whatever QEMU still has.
            self.confirm_late(view.grant);
        }
    }

    /// Whether the guest may still reach a view's memory.
    fn is_reachable(&self, view: &View) -> bool {
        view.is_reachable() && self.is_alive()
    }

    /// Does what sends commands on a thread of its own, and waits for it until the deadline;
    /// `false` where no thread can be started.
    fn within(&self, deadline: Instant, work: impl FnOnce(&Self) + Send + 'static) -> bool {
        let Some(me) = self.me.upgrade() else { return false };
        let (done, is_done) = mpsc::channel::<()>();
        let started = std::thread::Builder::new().name("qmp-commands".into()).spawn(move || {
            work(&me);
            drop(done);
        });
        // Nothing is sent: the channel closes when the work is done.
        let _ = is_done.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        started.is_ok()
    }

    /// Nothing is left of a view.
    fn forget(&self, view: &Arc<View>) {
        lock(&self.state).views.retain(|other| !Arc::ptr_eq(other, view));
        self.link.detached(view.number);
        view.settle(Phase::Closed);
        self.confirm_late(view.grant);
    }

    /// Confirms a revocation that could not be confirmed in time.
    pub(super) fn confirm_late(&self, grant: u64) {
        let is_held =
            self.views().iter().any(|view| view.grant == grant && self.is_reachable(view));
        let mut state = lock(&self.state);
        if !is_held && state.unconfirmed.remove(&grant) {
            drop(state);
            self.link.revoked(grant);
        }
    }

    /// Does what the operator wants done where a guest keeps what it must not; whether it is out of
    /// reach then.
    fn punish(&self, held: &[&Arc<View>], cause: Cause) -> bool {
        let policy = self.traits.on_silence;
        for view in held {
            if view.number != 0 {
                let vm = self.link.vm();
                self.audit(|audit| {
                    audit.silent(vm, view.number, view.grant, policy, cause.words())
                });
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
                self.within(Instant::now() + PAUSE_LIMIT, |it| {
                    if let Err(error) = it.monitor.execute("stop", serde_json::json!({})) {
                        let error: &dyn std::error::Error = &error;
                        tracing::error!(
                            introspector = it.name(),
                            error,
                            "cannot pause a silent introspector"
                        );
                    }
                });
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

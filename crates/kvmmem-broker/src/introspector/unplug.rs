// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Unplugs one view: the guest's driver is told, the devices are unplugged, QEMU releases the
//! memory.
//!
//! The driver is asked first, so that its processes learn why. That the guest reaches nothing any
//! more is not its word, though, but QEMU's: the devices are deleted. Nothing here waits: each step
//! looks at how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvmmem_qemu::windows::plug;
use serde_json::json;

use super::handle::Introspector;
use super::view::View;
use crate::sync::lock;

/// How long the driver may take to part its processes from the memory.
const SEEN_LIMIT: Duration = Duration::from_secs(1);

/// How long the guest may take in all until it has released the devices. The broker waits for 2 s
/// for a revocation to be confirmed, and a QEMU that has to be killed needs its part of that.
const END_LIMIT: Duration = Duration::from_millis(1300);

/// How long a guest may take to release what it did not take up.
const UNDO_LIMIT: Duration = Duration::from_secs(1);

/// How long each later attempt waits for the guest.
pub(super) const TRY_LIMIT: Duration = Duration::from_millis(200);

/// How long QEMU is waited for to release the memory, which it does when all its threads have; what
/// it has not by then is tried again later.
pub(super) const OBJECT_LIMIT: Duration = Duration::from_millis(100);

/// How soon that is tried again.
const OBJECT_RETRY: Duration = Duration::from_millis(2);

/// How soon the descriptor is looked at again: the guest cannot signal a thing.
const LOOK: Duration = Duration::from_micros(500);

/// A view that is being unplugged.
#[derive(Debug)]
pub(super) struct Unplugging {
    pub(super) view: Arc<View>,
    stage: Stage,
    /// How long the guest is waited for.
    until: Instant,
    /// How many of the last `object-del` are not answered.
    unanswered: Arc<AtomicUsize>,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// The driver is waited for, at most until then.
    Seen(Instant),
    /// The guest has been asked for the devices.
    Devices,
    /// QEMU has been asked for the memory.
    Objects { until: Instant, again: Instant },
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Something is waited for, at most until then.
    Waits(Instant),
    /// Nothing of the view is left.
    Gone,
    /// The guest has not released the devices in time, or QEMU the memory.
    Stuck,
}

impl Unplugging {
    /// A view that ends. After a reset there is no driver to be told.
    pub(super) fn of(view: Arc<View>, has_driver: bool, now: Instant) -> Self {
        let seen = if has_driver { now + SEEN_LIMIT } else { now };
        Self::with(view, seen, now + END_LIMIT)
    }

    /// A view that was not opened after all.
    pub(super) fn undo(view: Arc<View>, now: Instant) -> Self {
        Self::with(view, now, now + UNDO_LIMIT)
    }

    /// A view that was stuck.
    pub(super) fn again(view: Arc<View>, now: Instant) -> Self {
        Self::with(view, now, now + TRY_LIMIT)
    }

    fn with(view: Arc<View>, seen: Instant, until: Instant) -> Self {
        Self { view, stage: Stage::Seen(seen), until, unanswered: Arc::default() }
    }

    /// Does what can be done now.
    pub(super) fn advance(&mut self, it: &Introspector, is_alive: bool, now: Instant) -> Progress {
        loop {
            match self.stage {
                Stage::Seen(until) => {
                    if now < until && is_alive && !self.view.is_seen() {
                        return Progress::Waits((now + LOOK).min(until));
                    }
                    self.ask_for_devices(it);
                    self.stage = Stage::Devices;
                }
                Stage::Devices => {
                    let may_go = is_alive && it.monitor.is_up();
                    if may_go && now < self.until && lock(&self.view.plug).has_devices() {
                        return Progress::Waits(self.until);
                    }
                    if !lock(&self.view.plug).has_devices() {
                        it.retire(&self.view);
                    }
                    self.ask_for_objects(it);
                    self.stage =
                        Stage::Objects { until: now + OBJECT_LIMIT, again: now + OBJECT_RETRY };
                }
                Stage::Objects { until, again } => {
                    let (is_empty, has_devices) = {
                        let plug = lock(&self.view.plug);
                        (plug.is_empty(), plug.has_devices())
                    };
                    if is_empty || !is_alive {
                        return Progress::Gone;
                    }
                    if now < until && self.unanswered.load(Ordering::Acquire) > 0 {
                        return Progress::Waits(until);
                    }
                    if has_devices || now >= until || !it.monitor.is_up() {
                        return Progress::Stuck;
                    }
                    if now < again {
                        return Progress::Waits(again);
                    }
                    self.ask_for_objects(it);
                    self.stage = Stage::Objects { until, again: now + OBJECT_RETRY };
                }
            }
        }
    }

    /// Asks the guest to release what is plugged in; may be repeated.
    fn ask_for_devices(&self, it: &Introspector) {
        let ids = lock(&self.view.plug).to_unplug();
        for id in ids {
            let (view, inbox) = (Arc::clone(&self.view), Arc::clone(&it.inbox));
            it.monitor.send("device_del", &json!({ "id": id }), move |answer| {
                // Asked for already, or QEMU does not answer: it is tried again.
                if plug::is_not_found(&answer) {
                    lock(&view.plug).device_is_gone(&id);
                }
                inbox.wake();
            });
        }
    }

    /// Has QEMU delete the backends whose devices are gone.
    fn ask_for_objects(&mut self, it: &Introspector) {
        let ids = lock(&self.view.plug).to_delete();
        let unanswered = Arc::new(AtomicUsize::new(ids.len()));
        self.unanswered = Arc::clone(&unanswered);
        for id in ids {
            let (view, inbox) = (Arc::clone(&self.view), Arc::clone(&it.inbox));
            let unanswered = Arc::clone(&unanswered);
            it.monitor.send("object-del", &json!({ "id": id }), move |answer| {
                if answer.is_ok() || plug::is_not_found(&answer) {
                    lock(&view.plug).object_is_gone(&id);
                }
                unanswered.fetch_sub(1, Ordering::AcqRel);
                inbox.wake();
            });
        }
    }
}

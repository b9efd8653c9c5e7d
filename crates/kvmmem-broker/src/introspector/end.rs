// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why views end, and what the operator wants done where a guest keeps what it must not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_abi::native::{STATE_GONE, STATE_REVOKED};
use kvmmem_limit::RateLimit;
use kvmmem_proto::message::OnSilence;

use super::handle::Introspector;
use super::unplug::{OBJECT_LIMIT, TRY_LIMIT};
use super::view::{Phase, View};
use crate::audit::Event;
use crate::sync::lock;

/// How long after the cause the policy is applied at the latest, whether QEMU answers or not.
const WORK_LIMIT: Duration = Duration::from_millis(1500);

/// How much longer that is where QEMU was lost: it may answer again, or end, and is tried once more
/// then.
const FOUND_LIMIT: Duration =
    Duration::from_secs(2).saturating_add(TRY_LIMIT).saturating_add(OBJECT_LIMIT.saturating_mul(2));

/// A guest can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(5);

/// Why views end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// Their grant was revoked.
    Revoked,
    /// The target or the broker is no longer there.
    Gone,
    /// The introspector was reset, or has unplugged a device by itself: its driver has none of them
    /// any more.
    Reset,
    /// QEMU does not answer.
    Lost,
}

impl Cause {
    pub(super) fn state(self) -> u32 {
        if self == Self::Revoked { STATE_REVOKED } else { STATE_GONE }
    }

    /// Whether the guest may not keep the memory: the operator's policy counts then. Else it still
    /// has a right to it, and is only being tidied up after.
    pub(super) fn is_binding(self) -> bool {
        self != Self::Reset
    }

    fn words(self) -> &'static str {
        match self {
            Self::Revoked => "the grant was revoked",
            Self::Gone => "the target is gone",
            Self::Reset => "the introspector was reset",
            Self::Lost => "QEMU does not answer at its QMP socket",
        }
    }
}

/// The policy that is to be applied to a view that the guest still reaches.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) view: Arc<View>,
    cause: Cause,
    /// Applied then, or as soon as unplugging has failed.
    pub(super) at: Instant,
    /// Unplugging has failed while QEMU answered, or does not matter.
    is_ripe: bool,
}

impl Verdict {
    pub(super) fn new(view: Arc<View>, cause: Cause, now: Instant) -> Self {
        let is_lost = cause == Cause::Lost;
        let limit = if is_lost { WORK_LIMIT + FOUND_LIMIT } else { WORK_LIMIT };
        Self { view, cause, at: now + limit, is_ripe: !is_lost }
    }

    /// Records that unplugging a view has failed.
    pub(super) fn failed(&mut self, view: &Arc<View>, is_up: bool) {
        self.is_ripe |= is_up && Arc::ptr_eq(&self.view, view);
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        now >= self.at || (self.is_ripe && self.view.phase() == Phase::Stuck)
    }
}

impl Introspector {
    /// Nothing is left of a view.
    pub(super) fn forget(&self, view: &Arc<View>) {
        lock(&self.state).views.retain(|other| !Arc::ptr_eq(other, view));
        self.link.detached(view.number);
        view.settle_closed();
        view.grants().into_iter().for_each(|grant| self.confirm(grant));
    }

    /// Confirms a revocation, where the guest reaches nothing any more by that grant.
    pub(super) fn confirm(&self, grant: u64) {
        let is_by = |view: &View| view.grants().contains(&grant);
        let is_held = self.views().iter().any(|view| is_by(view) && view.is_reachable());
        let mut state = lock(&self.state);
        if (!is_held || !self.is_alive()) && state.unconfirmed.remove(&grant) {
            drop(state);
            self.link.revoked(grant);
        }
    }

    /// Does what the operator wants done where a guest keeps what it must not; whether its QEMU was
    /// killed.
    pub(super) fn punish(&self, verdict: &Verdict) -> bool {
        let (policy, view, words) =
            (self.traits.trust.on_silence, &verdict.view, verdict.cause.words());
        if view.number != 0 {
            let vm = self.link.vm();
            let (view, grant) = (view.number, view.grant);
            let reason = words;
            self.audit(|audit| {
                audit.write(Event::Silent { vm, view, grant, on_silence: policy, reason })
            });
        }
        if let Some(suppressed) = WARNINGS.allow(Instant::now()) {
            tracing::warn!(
                suppressed, introspector = self.name(), view = view.number, cause = words, policy = %policy,
                "an introspector's guest does not release a target's memory"
            );
        }
        match policy {
            OnSilence::Report => false,
            OnSilence::Pause => {
                // Resuming it gives it the memory back.
                let name = self.name().to_owned();
                self.monitor.send("stop", &serde_json::json!({}), move |answer| {
                    if let Err(error) = answer {
                        let error: &dyn std::error::Error = &error;
                        tracing::error!(
                            introspector = name,
                            error,
                            "cannot pause a silent introspector"
                        );
                    }
                });
                false
            }
            OnSilence::Kill => match self.process.kill() {
                Ok(()) => true,
                Err(error) => {
                    tracing::error!(introspector = self.name(), %error, "cannot kill a silent introspector");
                    false
                }
            },
        }
    }
}

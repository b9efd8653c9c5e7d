// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pauses of the machine's vCPUs and their registers, on request of the broker's clients.
//!
//! The broker's connection calls this ([`Vcpus`]). Each pause has a holder, and the vCPUs run again
//! once there is no holder: the broker resumes, its connection ends, or the broker hangs and does
//! not repeat a pause within [`LEASE`]. Lock order: `state`, then that of the [`Rendezvous`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvmmem_client::vmm::{VcpuAnswer, VcpuQuestion, Vcpus};

use super::registers::arrange;
use crate::machine::rendezvous::{PauseGuard, Rendezvous};

/// How long a pause lasts that is not repeated. The broker ends one that its client does not repeat
/// for 10 s.
const LEASE: Duration = Duration::from_secs(15);

/// The most pauses at a time.
const MAX_HOLDERS: usize = 1024;

/// Who needs the machine stopped.
#[derive(Default)]
pub(crate) struct Pauses(Mutex<State>);

#[derive(Default)]
struct State {
    /// The rendezvous of the vCPUs that run now.
    rendezvous: Option<Arc<Rendezvous>>,
    /// By number, with the time of the last repetition.
    holders: BTreeMap<u64, Instant>,
    /// Present while there are holders.
    paused: Option<PauseGuard>,
}

impl Pauses {
    /// The vCPUs that run from now on; `None` where there are none. All pauses end.
    pub(crate) fn set_rendezvous(&self, rendezvous: Option<Arc<Rendezvous>>) {
        let mut state = self.lock();
        state.resume_all();
        state.rendezvous = rendezvous;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn registers(&self, first: u32, count: u32) -> VcpuAnswer {
        // Without the lock: the machine may end meanwhile.
        let Some(rendezvous) = self.lock().rendezvous.clone() else { return not_running() };
        let all = match rendezvous.registers() {
            Ok(all) => all,
            Err(error) => return VcpuAnswer::Failed { message: error.to_string() },
        };
        let number = |number| usize::try_from(number).unwrap_or(usize::MAX);
        let more = all.len() > number(first).saturating_add(number(count));
        VcpuAnswer::Registers {
            vcpus: all.iter().skip(number(first)).take(number(count)).map(arrange).collect(),
            more,
        }
    }
}

impl Vcpus for Pauses {
    fn answer(&self, question: VcpuQuestion) -> VcpuAnswer {
        match question {
            VcpuQuestion::Registers { first, count } => self.registers(first, count),
            VcpuQuestion::Pause { holder, is_new } => self.lock().pause(holder, is_new),
            VcpuQuestion::Resume { holder } => self.lock().resume(holder),
        }
    }

    fn resume_all(&self) {
        self.lock().resume_all();
    }

    fn expire(&self) -> Option<Duration> {
        self.lock().expire(Instant::now())
    }
}

impl State {
    fn pause(&mut self, holder: u64, is_new: bool) -> VcpuAnswer {
        self.expire(Instant::now());
        if !is_new && !self.holders.contains_key(&holder) {
            return VcpuAnswer::NotPaused;
        }
        let Some(rendezvous) = &self.rendezvous else { return not_running() };
        if self.holders.len() >= MAX_HOLDERS && is_new {
            return VcpuAnswer::Failed {
                message: format!("it is paused {MAX_HOLDERS} times already"),
            };
        }
        if self.paused.is_none() {
            match rendezvous.pause() {
                Ok(paused) => self.paused = Some(paused),
                Err(error) => return VcpuAnswer::Failed { message: error.to_string() },
            }
        }
        self.holders.insert(holder, Instant::now());
        VcpuAnswer::Paused { was_running: true }
    }

    fn resume(&mut self, holder: u64) -> VcpuAnswer {
        if self.holders.remove(&holder).is_none() {
            return VcpuAnswer::NotPaused;
        }
        if self.holders.is_empty() {
            self.paused = None;
        }
        VcpuAnswer::Resumed
    }

    fn resume_all(&mut self) {
        self.holders.clear();
        self.paused = None;
    }

    /// Ends the pauses that were not repeated in time; returns how long until the next one is to
    /// end.
    fn expire(&mut self, now: Instant) -> Option<Duration> {
        self.holders.retain(|_, repeated| now.duration_since(*repeated) < LEASE);
        if self.holders.is_empty() && self.paused.take().is_some() {
            tracing::warn!("a pause was not repeated for {LEASE:?}: the VM runs again");
        }
        self.holders
            .values()
            .map(|repeated| LEASE.saturating_sub(now.duration_since(*repeated)))
            .min()
    }
}

fn not_running() -> VcpuAnswer {
    VcpuAnswer::Failed { message: "the VM is starting, restarting or ending; try again".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pauses() -> (Pauses, Arc<Rendezvous>) {
        let (pauses, rendezvous) = (Pauses::default(), Arc::new(Rendezvous::new(1)));
        pauses.set_rendezvous(Some(rendezvous.clone()));
        (pauses, rendezvous)
    }

    fn pause(pauses: &Pauses, holder: u64, is_new: bool) -> VcpuAnswer {
        pauses.answer(VcpuQuestion::Pause { holder, is_new })
    }

    fn resume(pauses: &Pauses, holder: u64) -> VcpuAnswer {
        pauses.answer(VcpuQuestion::Resume { holder })
    }

    #[test]
    fn the_machine_runs_once_nobody_needs_it_stopped() {
        let (pauses, rendezvous) = pauses();
        let stopped = VcpuAnswer::Paused { was_running: true };
        assert_eq!(pause(&pauses, 1, false), VcpuAnswer::NotPaused);
        for (holder, is_new) in [(1, true), (2, true), (1, false)] {
            assert_eq!(pause(&pauses, holder, is_new), stopped);
        }
        assert!(rendezvous.is_paused());
        assert_eq!((resume(&pauses, 1), rendezvous.is_paused()), (VcpuAnswer::Resumed, true));
        assert_eq!((resume(&pauses, 2), rendezvous.is_paused()), (VcpuAnswer::Resumed, false));
        assert_eq!(resume(&pauses, 2), VcpuAnswer::NotPaused);
        pause(&pauses, 3, true);
        pauses.resume_all();
        assert!(!rendezvous.is_paused());
        assert_eq!(pause(&pauses, 3, false), VcpuAnswer::NotPaused);
    }

    #[test]
    fn a_pause_ends_that_is_not_repeated() {
        let (pauses, rendezvous) = pauses();
        assert_eq!(pauses.expire(), None);
        pause(&pauses, 1, true);
        let later = |seconds| Instant::now() + Duration::from_secs(seconds);
        assert!(pauses.expire().is_some_and(|left| left <= LEASE) && rendezvous.is_paused());
        assert!(pauses.lock().expire(later(10)).is_some() && rendezvous.is_paused());
        assert_eq!(pauses.lock().expire(later(16)), None);
        assert!(!rendezvous.is_paused());
    }

    #[test]
    fn another_run_of_the_machine_is_not_paused() {
        let (pauses, rendezvous) = pauses();
        pause(&pauses, 1, true);
        let next = Arc::new(Rendezvous::new(1));
        pauses.set_rendezvous(Some(next.clone()));
        assert!(!rendezvous.is_paused() && !next.is_paused());
        assert_eq!(pause(&pauses, 1, false), VcpuAnswer::NotPaused);
        pauses.set_rendezvous(None);
        assert!(matches!(pause(&pauses, 1, true), VcpuAnswer::Failed { .. }));
    }
}

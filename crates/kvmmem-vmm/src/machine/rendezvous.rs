// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vCPU pause: keeps all vCPU threads of a generation out of the guest for a moment.
//!
//! A thread that changes memory slots under running vCPUs, or reads their registers, holds a
//! [`PauseGuard`]: windows, pages of v1 and the pauses that the broker asks for (`introspect`).
//! Several threads may hold one at a time; the vCPUs run again once the last is dropped.
//!
//! The invariant: while a guard lives, no thread is in `KVM_RUN`. A thread outside of `KVM_RUN`
//! does not count: it may wait for the very thread that pauses it. So a pause waits only for
//! threads in the guest, and kicks them until they have left.
//!
//! A paused thread reads its own vCPU's registers on request: no other thread can read them
//! without waiting for `KVM_RUN`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::machine::registers::Registers;

/// How long the vCPUs may take to leave the guest.
const LIMIT: Duration = Duration::from_secs(2);

/// How long a kicked vCPU may take before it is kicked again: a kick just before `KVM_RUN` is
/// lost.
const KICK_AGAIN: Duration = Duration::from_micros(50);

/// Signals a vCPU's thread, so that `KVM_RUN` returns.
type Kick = Box<dyn Fn() + Send>;

/// vCPUs did not leave the guest in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{inside} vCPUs are still in the guest after {LIMIT:?}")]
pub(crate) struct PauseError {
    /// How many.
    pub(crate) inside: usize,
}

/// The registers of the vCPUs cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RegistersError {
    /// The vCPUs do not leave the guest.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// Threads wait for something else, or have ended, and do not read their registers.
    #[error("{late} vCPUs have not shown their registers for {LIMIT:?}; try again")]
    Late {
        /// How many.
        late: usize,
    },
    /// KVM refuses to read them.
    #[error("KVM does not show the registers of all vCPUs")]
    Unreadable,
}

/// The vCPUs of one generation, which run or are paused together.
#[derive(Default)]
pub(crate) struct Rendezvous {
    /// Checked by each vCPU before `KVM_RUN`; changed with `state` locked.
    is_paused: AtomicBool,
    /// By vCPU: whether it is in the guest or about to enter it.
    inside: Vec<AtomicBool>,
    state: Mutex<State>,
    /// Signalled when the vCPUs may run again, and when registers are requested or were read.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// How many guards live.
    guards: usize,
    kicks: Vec<Kick>,
    /// How often registers were requested.
    wanted: u64,
    /// By vCPU: the number of the request that it answered last, and its registers if it could
    /// read them.
    registers: Vec<(u64, Option<Registers>)>,
}

impl Rendezvous {
    /// `vcpus` vCPUs, which may run.
    pub(crate) fn new(vcpus: u8) -> Self {
        let inside = (0..vcpus).map(|_| AtomicBool::new(false)).collect();
        let registers = vec![(0, None); usize::from(vcpus)];
        Self {
            inside,
            state: Mutex::new(State { registers, ..State::default() }),
            ..Self::default()
        }
    }

    /// Adds the kick of one more vCPU.
    pub(crate) fn add_kick(&self, kick: impl Fn() + Send + 'static) {
        self.lock().kicks.push(Box::new(kick));
    }

    /// Kicks all vCPUs once. One that is about to enter the guest may miss it.
    pub(crate) fn kick(&self) {
        self.lock().kicks.iter().for_each(|kick| kick());
    }

    /// Waits while the vCPUs are paused, and marks vCPU `id` as in the guest. `read` reads its
    /// registers if they are requested meanwhile.
    pub(crate) fn enter(&self, id: u8, read: impl Fn() -> Option<Registers>) -> InGuest<'_> {
        let inside = self.inside.get(usize::from(id));
        loop {
            if let Some(inside) = inside {
                inside.store(true, Ordering::SeqCst);
            }
            // Either this thread sees the pause, or the pausing thread sees this one inside.
            if !self.is_paused.load(Ordering::SeqCst) {
                return InGuest(inside);
            }
            drop(InGuest(inside));
            self.wait(usize::from(id), &read);
        }
    }

    /// Waits until the vCPUs may run.
    fn wait(&self, index: usize, read: &impl Fn() -> Option<Registers>) {
        let mut state = self.lock();
        while state.guards > 0 {
            let wanted = state.wanted;
            if state.registers.get(index).is_none_or(|(at, _)| *at == wanted) {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(state);
            let registers = read();
            state = self.lock();
            if let Some(own) = state.registers.get_mut(index) {
                *own = (wanted, registers);
            }
            self.changed.notify_all();
        }
    }

    /// The registers of all vCPUs at one moment: they are paused for it.
    ///
    /// # Errors
    /// [`RegistersError`].
    pub(crate) fn registers(self: &Arc<Self>) -> Result<Vec<Registers>, RegistersError> {
        let _paused = self.pause()?;
        let mut state = self.lock();
        state.wanted += 1;
        let wanted = state.wanted;
        self.changed.notify_all();
        let late = |state: &State| state.registers.iter().filter(|(at, _)| *at < wanted).count();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, LIMIT, |state| late(state) > 0)
            .unwrap_or_else(PoisonError::into_inner);
        match late(&state) {
            0 => {
                let all = state.registers.iter().map(|(_, registers)| registers.clone());
                all.collect::<Option<_>>().ok_or(RegistersError::Unreadable)
            }
            late => Err(RegistersError::Late { late }),
        }
    }

    /// Whether the vCPUs are paused.
    #[cfg(test)]
    pub(crate) fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::SeqCst)
    }

    /// Pauses the vCPUs: returns once none of them is in the guest.
    ///
    /// # Errors
    /// [`PauseError`]; this call pauses no vCPU any more.
    pub(crate) fn pause(self: &Arc<Self>) -> Result<PauseGuard, PauseError> {
        let paused = PauseGuard::new(self);
        let deadline = Instant::now() + LIMIT;
        loop {
            let inside = self.inside.iter().filter(|inside| inside.load(Ordering::SeqCst)).count();
            if inside == 0 {
                return Ok(paused);
            }
            if Instant::now() > deadline {
                return Err(PauseError { inside });
            }
            self.kick();
            std::thread::sleep(KICK_AGAIN);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Marks a vCPU as in the guest until it is dropped.
pub(crate) struct InGuest<'a>(Option<&'a AtomicBool>);

impl Drop for InGuest<'_> {
    fn drop(&mut self) {
        if let Some(inside) = self.0 {
            inside.store(false, Ordering::SeqCst);
        }
    }
}

/// Keeps all vCPUs out of the guest until it and all its clones are dropped.
pub(crate) struct PauseGuard(Arc<Rendezvous>);

impl PauseGuard {
    fn new(rendezvous: &Arc<Rendezvous>) -> Self {
        let mut state = rendezvous.lock();
        state.guards += 1;
        rendezvous.is_paused.store(true, Ordering::SeqCst);
        Self(rendezvous.clone())
    }
}

impl Clone for PauseGuard {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl Drop for PauseGuard {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.guards -= 1;
        if state.guards == 0 {
            self.0.is_paused.store(false, Ordering::SeqCst);
            drop(state);
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// A vCPU that stays in the guest until it is kicked, again and again.
    fn run(
        rendezvous: &Rendezvous,
        id: u8,
        kicked: &AtomicBool,
        done: &AtomicBool,
        inside: &AtomicUsize,
    ) {
        while !done.load(Ordering::SeqCst) {
            let _inside = rendezvous.enter(id, || None);
            inside.fetch_add(1, Ordering::SeqCst);
            while !kicked.swap(false, Ordering::SeqCst) && !done.load(Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            inside.fetch_sub(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn no_vcpu_is_in_the_guest_while_any_thread_pauses_them() {
        let rendezvous = Arc::new(Rendezvous::new(2));
        let kicked: [Arc<AtomicBool>; 2] = Default::default();
        for kicked in kicked.clone() {
            rendezvous.add_kick(move || kicked.store(true, Ordering::SeqCst));
        }
        let (done, inside) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for (id, kicked) in (0u8..).zip(&kicked) {
                let (rendezvous, done, inside) = (&rendezvous, &done, &inside);
                scope.spawn(move || run(rendezvous, id, kicked, done, inside));
            }
            let pausing: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        for _ in 0..100 {
                            let paused = rendezvous.pause().unwrap();
                            assert_eq!(inside.load(Ordering::SeqCst), 0);
                            std::thread::yield_now();
                            assert_eq!(inside.load(Ordering::SeqCst), 0);
                            let second = paused.clone();
                            drop(paused);
                            assert_eq!(inside.load(Ordering::SeqCst), 0);
                            drop(second);
                        }
                    })
                })
                .collect();
            let results = pausing.into_iter().map(|thread| thread.join()).collect::<Vec<_>>();
            done.store(true, Ordering::SeqCst);
            assert!(results.iter().all(Result::is_ok));
        });
    }

    #[test]
    fn a_pause_that_times_out_leaves_the_vcpus_running() {
        let rendezvous = Arc::new(Rendezvous::new(2));
        let inside = rendezvous.enter(0, || None);
        assert_eq!(rendezvous.pause().err(), Some(PauseError { inside: 1 }));
        drop(rendezvous.enter(1, || None));
        drop(inside);
        drop(rendezvous.pause().unwrap());
        drop(rendezvous.enter(0, || None));
    }

    #[test]
    fn registers_are_those_of_the_vcpus_that_wait() {
        let rendezvous = Arc::new(Rendezvous::new(2));
        let kicked: [Arc<AtomicBool>; 2] = Default::default();
        for kicked in kicked.clone() {
            rendezvous.add_kick(move || kicked.store(true, Ordering::SeqCst));
        }
        let done = AtomicBool::new(false);
        let entries = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for (id, kicked) in (0u8..).zip(&kicked) {
                let (rendezvous, done, entries) = (&rendezvous, &done, &entries);
                scope.spawn(move || {
                    let read = || {
                        let mut registers = Registers::default();
                        registers.general.rip = u64::from(id) + 1;
                        Some(registers)
                    };
                    while !done.load(Ordering::SeqCst) {
                        let _inside = rendezvous.enter(id, read);
                        entries.fetch_add(1, Ordering::SeqCst);
                        while !kicked.swap(false, Ordering::SeqCst) && !done.load(Ordering::SeqCst)
                        {
                            std::hint::spin_loop();
                        }
                    }
                });
            }
            let rips = || {
                rendezvous
                    .registers()
                    .map(|all| all.iter().map(|vcpu| vcpu.general.rip).collect::<Vec<_>>())
            };
            // While they run, and while they are stopped.
            let running = rips();
            let paused = rendezvous.pause();
            let before = entries.load(Ordering::SeqCst);
            let stopped = [rips(), rips()];
            let after = entries.load(Ordering::SeqCst);
            drop(paused);
            while entries.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
            done.store(true, Ordering::SeqCst);
            assert_eq!((running, stopped), (Ok(vec![1, 2]), [Ok(vec![1, 2]), Ok(vec![1, 2])]));
            assert_eq!(before, after);
        });
        // Threads that have ended read no registers.
        assert_eq!(rendezvous.registers(), Err(RegistersError::Late { late: 2 }));
    }
}

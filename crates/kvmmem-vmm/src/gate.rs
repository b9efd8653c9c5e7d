// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The way of the vCPU threads into the guest, which can be closed for a moment.
//!
//! A thread that is not in `KVM_RUN` is outside, whatever it does there: it may wait for the very
//! thread that closes the gate. So the one that closes it waits for threads in the guest alone, and
//! those come out when they are kicked.
//!
//! While it is closed, the threads that wait in front of it can be asked for their vCPU's
//! registers, which nothing else can read without waiting for `KVM_RUN`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvmmem_client::vmm::VcpuRegisters;

/// How long the vCPUs may take to come out.
const LIMIT: Duration = Duration::from_secs(2);

/// How long a kicked vCPU is waited for before it is kicked again: it may have been kicked just
/// before it went in.
const KICK_AGAIN: Duration = Duration::from_micros(50);

/// What calls a vCPU's thread out of the guest.
type Kick = Box<dyn Fn() + Send>;

/// The vCPUs have not come out in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{inside} vCPUs are still in the guest after {LIMIT:?}")]
pub(crate) struct PauseError {
    /// How many.
    pub(crate) inside: usize,
}

/// The registers of the vCPUs are not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RegistersError {
    /// The vCPUs do not come out of the guest.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// Threads do not come to the gate, as they wait for something else, or end.
    #[error("{late} vCPUs have not shown their registers for {LIMIT:?}; try again")]
    Late {
        /// How many.
        late: usize,
    },
    /// KVM does not show them.
    #[error("KVM does not show the registers of all vCPUs")]
    Unreadable,
}

/// The gate of one generation's vCPUs.
#[derive(Default)]
pub(crate) struct Gate {
    /// What a vCPU looks at on its way in; changed with `state` locked.
    is_closed: AtomicBool,
    /// By vCPU: whether it is in the guest or on its way in.
    inside: Vec<AtomicBool>,
    state: Mutex<State>,
    /// Signalled when the gate opens, when registers are wanted, and when they are there.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// How many hold the gate closed.
    closers: usize,
    kicks: Vec<Kick>,
    /// How often registers were wanted.
    wanted: u64,
    /// By vCPU: its registers, if they could be read, as they were wanted for so many times.
    registers: Vec<(u64, Option<VcpuRegisters>)>,
}

impl Gate {
    /// An open gate for `vcpus` vCPUs.
    pub(crate) fn new(vcpus: u8) -> Self {
        let inside = (0..vcpus).map(|_| AtomicBool::new(false)).collect();
        let registers = vec![(0, None); usize::from(vcpus)];
        Self {
            inside,
            state: Mutex::new(State { registers, ..State::default() }),
            ..Self::default()
        }
    }

    /// Adds what calls one more vCPU out of the guest.
    pub(crate) fn add_kick(&self, kick: impl Fn() + Send + 'static) {
        self.lock().kicks.push(Box::new(kick));
    }

    /// Calls all vCPUs out of the guest, once; one may miss the call on its way in.
    pub(crate) fn kick(&self) {
        self.lock().kicks.iter().for_each(|kick| kick());
    }

    /// Lets vCPU `id` in, which first waits as long as the gate is closed. `read` reads its
    /// registers where they are wanted meanwhile.
    pub(crate) fn enter(&self, id: u8, read: impl Fn() -> Option<VcpuRegisters>) -> Inside<'_> {
        let inside = self.inside.get(usize::from(id));
        loop {
            if let Some(inside) = inside {
                inside.store(true, Ordering::SeqCst);
            }
            // Either this thread sees the gate closed, or whoever closes it sees this thread
            // inside.
            if !self.is_closed.load(Ordering::SeqCst) {
                return Inside(inside);
            }
            drop(Inside(inside));
            self.wait(usize::from(id), &read);
        }
    }

    /// Waits until the gate is open.
    fn wait(&self, index: usize, read: &impl Fn() -> Option<VcpuRegisters>) {
        let mut state = self.lock();
        while state.closers > 0 {
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

    /// The registers of all vCPUs, at one moment: the gate is closed for it.
    ///
    /// # Errors
    /// [`RegistersError`].
    pub(crate) fn registers(self: &Arc<Self>) -> Result<Vec<VcpuRegisters>, RegistersError> {
        let _paused = self.close()?;
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

    /// Whether it is closed.
    #[cfg(test)]
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    /// Closes the gate and returns once no vCPU is in the guest. It opens when all who have closed
    /// it have dropped what they got.
    ///
    /// # Errors
    /// [`PauseError`], and the gate is as it was.
    pub(crate) fn close(self: &Arc<Self>) -> Result<Paused, PauseError> {
        let paused = Paused::new(self);
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

/// A vCPU in the guest.
pub(crate) struct Inside<'a>(Option<&'a AtomicBool>);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if let Some(inside) = self.0 {
            inside.store(false, Ordering::SeqCst);
        }
    }
}

/// A closed gate with no vCPU behind it.
pub(crate) struct Paused(Arc<Gate>);

impl Paused {
    fn new(gate: &Arc<Gate>) -> Self {
        let mut state = gate.lock();
        state.closers += 1;
        gate.is_closed.store(true, Ordering::SeqCst);
        Self(gate.clone())
    }
}

impl Clone for Paused {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closers -= 1;
        if state.closers == 0 {
            self.0.is_closed.store(false, Ordering::SeqCst);
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
    fn run(gate: &Gate, id: u8, kicked: &AtomicBool, done: &AtomicBool, inside: &AtomicUsize) {
        while !done.load(Ordering::SeqCst) {
            let _inside = gate.enter(id, || None);
            inside.fetch_add(1, Ordering::SeqCst);
            while !kicked.swap(false, Ordering::SeqCst) && !done.load(Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            inside.fetch_sub(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn nobody_is_inside_while_it_is_closed_whoever_closes_it() {
        let gate = Arc::new(Gate::new(2));
        let kicked: [Arc<AtomicBool>; 2] = Default::default();
        for kicked in kicked.clone() {
            gate.add_kick(move || kicked.store(true, Ordering::SeqCst));
        }
        let (done, inside) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for (id, kicked) in (0u8..).zip(&kicked) {
                let (gate, done, inside) = (&gate, &done, &inside);
                scope.spawn(move || run(gate, id, kicked, done, inside));
            }
            let closers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        for _ in 0..100 {
                            let paused = gate.close().unwrap();
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
            let closed = closers.into_iter().map(|closer| closer.join()).collect::<Vec<_>>();
            done.store(true, Ordering::SeqCst);
            assert!(closed.iter().all(Result::is_ok));
        });
    }

    #[test]
    fn a_vcpu_that_does_not_come_out_is_given_up_and_the_gate_is_open() {
        let gate = Arc::new(Gate::new(2));
        let inside = gate.enter(0, || None);
        assert_eq!(gate.close().err(), Some(PauseError { inside: 1 }));
        drop(gate.enter(1, || None));
        drop(inside);
        drop(gate.close().unwrap());
        drop(gate.enter(0, || None));
    }

    #[test]
    fn registers_are_those_of_the_vcpus_that_wait() {
        let gate = Arc::new(Gate::new(2));
        let kicked: [Arc<AtomicBool>; 2] = Default::default();
        for kicked in kicked.clone() {
            gate.add_kick(move || kicked.store(true, Ordering::SeqCst));
        }
        let done = AtomicBool::new(false);
        let entries = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for (id, kicked) in (0u8..).zip(&kicked) {
                let (gate, done, entries) = (&gate, &done, &entries);
                scope.spawn(move || {
                    let read =
                        || Some(VcpuRegisters { rip: u64::from(id) + 1, ..Default::default() });
                    while !done.load(Ordering::SeqCst) {
                        let _inside = gate.enter(id, read);
                        entries.fetch_add(1, Ordering::SeqCst);
                        while !kicked.swap(false, Ordering::SeqCst) && !done.load(Ordering::SeqCst)
                        {
                            std::hint::spin_loop();
                        }
                    }
                });
            }
            let rips =
                || gate.registers().map(|all| all.iter().map(|vcpu| vcpu.rip).collect::<Vec<_>>());
            // While they run, and while they are stopped.
            let running = rips();
            let paused = gate.close();
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
        // Of threads that are gone there are none.
        assert_eq!(gate.registers(), Err(RegistersError::Late { late: 2 }));
    }
}

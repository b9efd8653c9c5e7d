// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Deferred requests to the broker, which outlast a hypercall so that no vCPU waits for the broker.
//!
//! A thread makes the request. The vCPU waits for [`PATIENCE`]. Without an answer by then it
//! executes its hypercall again ([`super::again`]), takes its interrupts, and asks here for the
//! same request. The guest may have moved the caller to another vCPU meanwhile, so a request
//! belongs to the machine and is found by its key.
//!
//! If the guest does not repeat the call, the answer is released after [`KEPT`], or when the
//! machine ends or resets.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use kvmmem_abi::errno::KvmError;

/// How long a vCPU waits before it serves interrupts.
const PATIENCE: Duration = Duration::from_millis(1);

/// How long an answer waits for the guest. A caller that the guest's scheduler has preempted comes
/// back much sooner.
const KEPT: Duration = Duration::from_secs(10);

/// The most requests of one machine; each has a thread.
const MOST: usize = 64;

/// The requests of one kind, between two resets of a machine. When this is dropped, its threads are
/// gone.
pub(super) struct DeferredRequests<K, T> {
    shared: Arc<Shared<K, T>>,
    kept: Duration,
}

struct Shared<K, T> {
    state: Mutex<State<K, T>>,
    changed: Condvar,
}

struct State<K, T> {
    requests: Vec<Request<K, T>>,
    threads: Vec<JoinHandle<()>>,
    last_number: u64,
    is_ending: bool,
}

struct Request<K, T> {
    number: u64,
    key: K,
    /// `None` while the broker is asked.
    outcome: Option<Result<T, KvmError>>,
}

impl<K, T> State<K, T> {
    fn find(&self, number: u64) -> Option<&Request<K, T>> {
        self.requests.iter().find(|request| request.number == number)
    }

    fn take(&mut self, number: u64) -> Option<Request<K, T>> {
        let index = self.requests.iter().position(|request| request.number == number)?;
        Some(self.requests.swap_remove(index))
    }
}

impl<K: PartialEq + Send + 'static, T: Send + 'static> DeferredRequests<K, T> {
    pub(super) fn new() -> Self {
        Self::keeping(KEPT)
    }

    fn keeping(kept: Duration) -> Self {
        let state =
            State { requests: Vec::new(), threads: Vec::new(), last_number: 0, is_ending: false };
        Self {
            shared: Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }),
            kept,
        }
    }

    /// The outcome of the request that `key` names, which `work` makes unless it is under way
    /// already. An outcome that is not fetched is given to `release`.
    pub(super) fn fetch(
        &self,
        key: K,
        work: impl FnOnce() -> Result<T, KvmError> + Send + 'static,
        release: impl FnOnce(T) + Send + 'static,
    ) -> Poll<Result<T, KvmError>> {
        let mut state = self.shared.lock();
        let known =
            state.requests.iter().find(|request| request.key == key).map(|request| request.number);
        let number = match known {
            Some(number) => number,
            None if state.requests.len() >= MOST => return Poll::Ready(Err(KvmError::Again)),
            None => {
                state.last_number += 1;
                let (number, shared, kept) = (state.last_number, self.shared.clone(), self.kept);
                let run = move || shared.run(number, kept, work, release);
                let Ok(thread) = std::thread::Builder::new().name("token".into()).spawn(run) else {
                    return Poll::Ready(Err(KvmError::Again));
                };
                state.threads.retain(|thread| !thread.is_finished());
                state.threads.push(thread);
                state.requests.push(Request { number, key, outcome: None });
                number
            }
        };
        let is_waiting = |state: &mut State<K, T>| {
            state.find(number).is_some_and(|request| request.outcome.is_none())
        };
        let (mut state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, PATIENCE, is_waiting)
            .unwrap_or_else(PoisonError::into_inner);
        if is_waiting(&mut state) {
            return Poll::Pending;
        }
        let outcome = state.take(number).and_then(|request| request.outcome);
        drop(state);
        self.shared.changed.notify_all();
        // Where another vCPU has made the same call at the same time, one of them has the outcome.
        Poll::Ready(outcome.unwrap_or(Err(KvmError::Busy)))
    }
}

impl<K, T> Shared<K, T> {
    fn run(
        &self,
        number: u64,
        kept: Duration,
        work: impl FnOnce() -> Result<T, KvmError>,
        release: impl FnOnce(T),
    ) {
        let outcome = work();
        let mut state = self.lock();
        if let Some(request) = state.requests.iter_mut().find(|request| request.number == number) {
            request.outcome = Some(outcome);
        }
        self.changed.notify_all();
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, kept, |state| {
                !state.is_ending && state.find(number).is_some()
            })
            .unwrap_or_else(PoisonError::into_inner);
        let abandoned = state.take(number);
        drop(state);
        if let Some(Request { outcome: Some(Ok(value)), .. }) = abandoned {
            release(value);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<K, T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K, T> Drop for DeferredRequests<K, T> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.is_ending = true;
        let threads = std::mem::take(&mut state.threads);
        drop(state);
        self.shared.changed.notify_all();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// A request whose answer is what is sent; what is released is received.
    struct Question {
        answer: Sender<Result<u32, KvmError>>,
        released: Receiver<u32>,
    }

    fn ask(
        deferred: &DeferredRequests<u32, u32>,
        key: u32,
    ) -> (Question, Poll<Result<u32, KvmError>>) {
        let ((answer, wait), (release, released)) = (channel(), channel());
        let progress = deferred.fetch(
            key,
            move || wait.recv_timeout(LONG).unwrap(),
            // The test may have ended.
            move |value| {
                let _ = release.send(value);
            },
        );
        (Question { answer, released }, progress)
    }

    /// What a call that comes back gets in the end.
    fn come_back(deferred: &DeferredRequests<u32, u32>, key: u32) -> Result<u32, KvmError> {
        loop {
            if let Poll::Ready(outcome) = deferred.fetch(key, || unreachable!(), |_| {}) {
                return outcome;
            }
        }
    }

    #[test]
    fn an_answer_is_fetched_by_the_call_that_comes_back() {
        let deferred = DeferredRequests::keeping(LONG);
        let (first, progress) = ask(&deferred, 1);
        assert_eq!(progress, Poll::Pending);
        let (second, progress) = ask(&deferred, 2);
        assert_eq!(progress, Poll::Pending);
        assert_eq!(deferred.fetch(1, || unreachable!(), |_| {}), Poll::Pending);
        second.answer.send(Err(KvmError::Perm)).unwrap();
        first.answer.send(Ok(11)).unwrap();
        assert_eq!(come_back(&deferred, 1), Ok(11));
        assert_eq!(come_back(&deferred, 2), Err(KvmError::Perm));
        // Done for good: the same call is another request.
        let (third, progress) = ask(&deferred, 1);
        assert_eq!(progress, Poll::Pending);
        third.answer.send(Ok(12)).unwrap();
        assert_eq!(come_back(&deferred, 1), Ok(12));
        drop(deferred);
        assert!(first.released.recv().is_err());
    }

    #[test]
    fn an_answer_that_nobody_fetches_is_released() {
        let deferred = DeferredRequests::keeping(Duration::from_millis(1));
        let (asked, progress) = ask(&deferred, 1);
        assert_eq!(progress, Poll::Pending);
        asked.answer.send(Ok(11)).unwrap();
        assert_eq!(asked.released.recv_timeout(LONG), Ok(11));

        let deferred = DeferredRequests::keeping(LONG);
        let (asked, progress) = ask(&deferred, 1);
        assert_eq!(progress, Poll::Pending);
        asked.answer.send(Ok(12)).unwrap();
        drop(deferred);
        assert_eq!(asked.released.try_recv(), Ok(12));
    }

    #[test]
    fn requests_are_bounded() {
        let deferred = DeferredRequests::keeping(LONG);
        let most = u32::try_from(MOST).unwrap();
        let asked: Vec<_> = (0..most).map(|key| ask(&deferred, key)).collect();
        assert_eq!(ask(&deferred, most).1, Poll::Ready(Err(KvmError::Again)));
        for (asked, _) in &asked {
            asked.answer.send(Ok(0)).unwrap();
        }
        assert_eq!(come_back(&deferred, 5), Ok(0));
    }
}

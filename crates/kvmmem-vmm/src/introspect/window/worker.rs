// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Worker thread of the windows: unmaps what a guest no longer reaches, and reports counters.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvmmem_sys::window::GuestMapping;

/// Between two times that counters are told.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// The most pieces of work that wait. A guest that opens and closes views faster unmaps them
/// itself.
const MOST_WAITING: usize = 64;

enum Work {
    Unmap(Vec<GuestMapping>),
    Tell,
}

/// The thread; gone when dropped.
pub(super) struct Worker {
    queue: Option<SyncSender<Work>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// A thread that calls `tell` at most every [`TELL_EVERY`], and only when it was asked to.
    pub(super) fn start(tell: impl Fn() + Send + 'static) -> io::Result<Self> {
        let (queue, work) = sync_channel(MOST_WAITING);
        let thread =
            std::thread::Builder::new().name("views".into()).spawn(move || run(&work, &tell))?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Unmaps `mappings`, soon. Page tables of gigabytes take a while.
    pub(super) fn unmap(&self, mappings: Vec<GuestMapping>) {
        if let Some(queue) = self.queue.as_ref().filter(|_| !mappings.is_empty())
            && let Err(TrySendError::Full(work) | TrySendError::Disconnected(work)) =
                queue.try_send(Work::Unmap(mappings))
        {
            drop(work);
        }
    }

    /// Has counters told; false if that must be asked for again.
    pub(super) fn tell(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.try_send(Work::Tell).is_ok())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(work: &Receiver<Work>, tell: &dyn Fn()) {
    let mut told: Option<Instant> = None;
    let mut due: Option<Instant> = None;
    loop {
        let next = match due {
            None => work.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(due) => work.recv_timeout(due.saturating_duration_since(Instant::now())),
        };
        match next {
            Ok(Work::Unmap(mappings)) => drop(mappings),
            Ok(Work::Tell) => {
                let now = Instant::now();
                due = due.or_else(|| Some(told.map_or(now, |told| told + TELL_EVERY)));
            }
            Err(RecvTimeoutError::Timeout) => {
                tell();
                (told, due) = (Some(Instant::now()), None);
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

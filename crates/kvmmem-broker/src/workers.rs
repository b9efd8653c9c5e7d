// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Workers: threads that do what the [`Reactor`](crate::reactor::Reactor) must not wait for.
//!
//! There are as many as there is work, up to a limit. Work for one party (a VM, a user) never takes
//! more than a share of them: a target whose memory cannot be read holds up itself alone.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A worker's stack; little of it is ever touched.
const STACK: usize = 512 << 10;

/// How long a worker waits for more work before it ends.
const IDLE: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce() + Send>;

/// For whom work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Party {
    /// All VMMs, for what is done for many of them at a time.
    Vmms,
    /// The VM with this vsock context id.
    Cid(u32),
}

/// A pool of threads. Clones are the same pool.
#[derive(Clone)]
pub(crate) struct Workers(Arc<Shared>);

struct Shared {
    name: &'static str,
    /// The most threads.
    most: usize,
    /// The most threads that work for one party.
    share: usize,
    pool: Mutex<Pool>,
    /// Signalled when there is work, or the pool ends.
    changed: Condvar,
}

#[derive(Default)]
struct Pool {
    queue: VecDeque<(Party, Job)>,
    /// How many threads work for each party.
    busy: HashMap<Party, usize>,
    threads: usize,
    /// Threads without work.
    idle: usize,
    is_ended: bool,
}

impl Pool {
    /// The first job of a party that has not its share of the threads.
    fn take(&mut self, share: usize) -> Option<(Party, Job)> {
        let busy = &self.busy;
        let may_run = |(party, _): &(Party, Job)| busy.get(party).is_none_or(|busy| *busy < share);
        let index = self.queue.iter().position(may_run)?;
        let job = self.queue.remove(index)?;
        *self.busy.entry(job.0).or_default() += 1;
        Some(job)
    }

    fn done(&mut self, party: Party) {
        if let Some(busy) = self.busy.get_mut(&party) {
            *busy -= 1;
            if *busy == 0 {
                self.busy.remove(&party);
            }
        }
    }
}

impl Workers {
    /// A pool of at most `most` threads of this name, at most `share` of which work for one party.
    pub(crate) fn new(name: &'static str, most: usize, share: usize) -> Self {
        let shared = Shared { name, most, share, pool: Mutex::default(), changed: Condvar::new() };
        Self(Arc::new(shared))
    }

    /// Starts the thread that stays, unless it runs: from then on jobs are always done.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub(crate) fn start(&self) -> io::Result<()> {
        let mut pool = self.lock();
        if pool.threads == 0 && !pool.is_ended {
            self.spawn(&mut pool)?;
        }
        Ok(())
    }

    /// Does a job as soon as there is a thread for it. After [`Self::end`] it is dropped.
    pub(crate) fn run(&self, party: Party, job: impl FnOnce() + Send + 'static) {
        let mut pool = self.lock();
        if pool.is_ended {
            return;
        }
        pool.queue.push_back((party, Box::new(job)));
        if pool.queue.len() > pool.idle && pool.threads < self.0.most
            // Those that there are do it.
            && let Err(error) = self.spawn(&mut pool)
        {
            tracing::debug!(%error, name = self.0.name, "cannot start a worker");
        }
        drop(pool);
        self.0.changed.notify_one();
    }

    /// Drops all jobs that wait; threads end when they are done with the one that they have.
    pub(crate) fn end(&self) {
        let mut pool = self.lock();
        pool.is_ended = true;
        // What a job drops may use the pool.
        let queue = std::mem::take(&mut pool.queue);
        drop(pool);
        drop(queue);
        self.0.changed.notify_all();
    }

    fn spawn(&self, pool: &mut Pool) -> io::Result<()> {
        let workers = self.clone();
        let thread = std::thread::Builder::new().name(self.0.name.into()).stack_size(STACK);
        thread.spawn(move || workers.work())?;
        pool.threads += 1;
        Ok(())
    }

    fn work(&self) {
        let mut pool = self.lock();
        while !pool.is_ended {
            if let Some((party, job)) = pool.take(self.0.share) {
                drop(pool);
                job();
                pool = self.lock();
                pool.done(party);
                // What waited for the party's share may run now.
                if !pool.queue.is_empty() {
                    self.0.changed.notify_one();
                }
                continue;
            }
            pool.idle += 1;
            let waited = self.0.changed.wait_timeout(pool, IDLE);
            let (next, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            pool = next;
            pool.idle -= 1;
            if timeout.timed_out() && pool.queue.is_empty() && pool.threads > 1 {
                break;
            }
        }
        pool.threads -= 1;
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.0.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").field("name", &self.0.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    /// How long anything may take on a slow machine.
    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn one_party_takes_its_share_and_no_more() {
        let workers = Workers::new("test", 4, 2);
        workers.start().unwrap();
        let (done, are_done) = mpsc::channel();
        let (free, is_free) = mpsc::channel::<()>();
        let is_free = Arc::new(Mutex::new(is_free));
        // Jobs that do not end.
        for _ in 0..10 {
            let (done, is_free) = (done.clone(), Arc::clone(&is_free));
            workers.run(Party::Cid(1), move || {
                done.send(1).unwrap();
                let _ = is_free.lock().unwrap().recv();
            });
        }
        assert_eq!([are_done.recv_timeout(LIMIT), are_done.recv_timeout(LIMIT)], [Ok(1), Ok(1)]);
        for _ in 0..100 {
            let done = done.clone();
            workers.run(Party::Cid(2), move || done.send(2).unwrap());
        }
        for _ in 0..100 {
            assert_eq!(are_done.recv_timeout(LIMIT), Ok(2));
        }
        assert!(workers.lock().threads <= 4);
        drop(free);
        for _ in 0..8 {
            assert_eq!(are_done.recv_timeout(LIMIT), Ok(1));
        }
        workers.end();
    }

    #[test]
    fn all_but_one_end_when_there_is_no_work() {
        let workers = Workers::new("test", 8, 8);
        let (free, is_free) = mpsc::channel::<()>();
        let is_free = Arc::new(Mutex::new(is_free));
        let (begun, have_begun) = mpsc::channel();
        for _ in 0..8 {
            let (begun, is_free) = (begun.clone(), Arc::clone(&is_free));
            workers.run(Party::Vmms, move || {
                begun.send(()).unwrap();
                drop(is_free.lock().map(|is_free| is_free.recv()));
            });
        }
        (0..8).for_each(|_| have_begun.recv_timeout(LIMIT).unwrap());
        assert_eq!(workers.lock().threads, 8);
        drop(free);
        let deadline = Instant::now() + LIMIT;
        while workers.lock().threads > 1 {
            assert!(Instant::now() < deadline, "they stay");
            std::thread::sleep(Duration::from_millis(5));
        }
        // The last one is there for more.
        workers.run(Party::Vmms, move || begun.send(()).unwrap());
        have_begun.recv_timeout(LIMIT).unwrap();
        let shared = Arc::downgrade(&workers.0);
        workers.end();
        workers.run(Party::Vmms, || panic!("it has ended"));
        drop(workers);
        while shared.strong_count() > 0 {
            assert!(Instant::now() < deadline, "its threads do not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Workers: threads that do what the [`Reactor`] must not wait for.
//!
//! A pool has one thread, and more while jobs wait for those that there are. Jobs for one party (a
//! VM, a path) never take more than a share of them: a target whose memory cannot be read holds up
//! itself alone. Parties without a thread go first.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use crate::reactor::{Reactor, Token};
use crate::sync::lock;

/// A worker's stack; little of it is ever touched.
const STACK: usize = 512 << 10;

/// The most threads that look for paths that the kernel may have to ask a file system for, which
/// may never answer.
const MAX_PATHS: usize = 16;

/// The most threads beyond them that look for paths which the kernel knows without that.
const MAX_CACHED_PATHS: usize = 4;

/// How many of them have begun within [`HUNG`], at most: file systems that answer need no more.
const MAX_NEW_PATHS: usize = 4;

/// How long a file system may take before it counts as one that does not answer.
const HUNG: Duration = Duration::from_millis(250);

/// The most paths of either kind that wait for a thread.
const MAX_WAITING_PATHS: usize = 256;

/// How long a worker waits for more work before it ends.
const IDLE: Duration = Duration::from_secs(5);

/// How long a job waits before there is one thread more: most jobs are over before that.
const GROW: Duration = Duration::from_millis(2);

type Job = Box<dyn FnOnce() + Send>;

/// For whom work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Party {
    /// All VMMs, for what is done for many of them at a time.
    Vmms,
    /// The target with this number.
    Target(u64),
    /// The VM with this vsock context id.
    Cid(u32),
    /// The path in a file system that has this hash.
    Path(u64),
    /// The same, of a path that the kernel has in its cache: it asks no file system for it.
    CachedPath(u64),
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
    reactor: Reactor,
    pool: Mutex<Pool>,
}

#[derive(Default)]
struct Pool {
    queue: VecDeque<(Party, Job)>,
    /// How many threads work for each party.
    busy: HashMap<Party, usize>,
    /// When the threads that look for paths have begun.
    lookups: HashMap<Party, Instant>,
    threads: usize,
    /// Threads without work. The last one gets the next job, so that the others end at some time.
    idle: Vec<Thread>,
    /// Calls [`Workers::grow`], where the pool has started.
    token: Option<Token>,
    grows_at: Option<Instant>,
    is_ended: bool,
}

impl Pool {
    /// Where in the queue the next job is: the first one of the parties with the fewest threads,
    /// unless they have their share.
    fn next(&self, share: usize, now: Instant) -> Option<usize> {
        let mut best = None;
        for (index, (party, _)) in self.queue.iter().enumerate() {
            let share = if party.is_path() { self.has_room(*party, now).into() } else { share };
            let busy = self.busy.get(party).copied().unwrap_or(0);
            if busy < share && best.is_none_or(|(least, _)| busy < least) {
                best = Some((busy, index));
                if busy == 0 {
                    break;
                }
            }
        }
        best.map(|(_, index)| index)
    }

    fn take(&mut self, share: usize, now: Instant) -> Option<(Party, Job)> {
        let job = self.queue.remove(self.next(share, now)?)?;
        *self.busy.entry(job.0).or_default() += 1;
        if job.0.is_path() {
            self.lookups.insert(job.0, now);
        }
        Some(job)
    }

    /// Whether one more thread may look for this path.
    fn has_room(&self, path: Party, now: Instant) -> bool {
        let is_new = |began: &&Instant| now.saturating_duration_since(**began) < HUNG;
        self.lookups.len() < path.most_lookups()
            && self.lookups.values().filter(is_new).count() < MAX_NEW_PATHS
    }

    /// Whether a job for a path may wait: not too many do of its kind, and no other one is for that
    /// path if it may hang. So those whose file systems do not answer cannot fill the queue.
    fn takes_path(&self, path: Party) -> bool {
        let is_alike = |party: &&Party| party.most_lookups() == path.most_lookups();
        let waiting = || self.queue.iter().map(|(party, _)| party).filter(is_alike);
        let is_there = || self.lookups.contains_key(&path) || waiting().any(|it| *it == path);
        waiting().count() < MAX_WAITING_PATHS
            && (matches!(path, Party::CachedPath(_)) || !is_there())
    }

    fn done(&mut self, party: Party) {
        if let Some(busy) = self.busy.get_mut(&party) {
            *busy -= 1;
            if *busy == 0 {
                self.busy.remove(&party);
            }
        }
        self.lookups.remove(&party);
    }
}

impl Party {
    fn is_path(self) -> bool {
        self.most_lookups() > 0
    }

    /// With how many threads at most, that look for paths, one more may look for this one.
    fn most_lookups(self) -> usize {
        match self {
            Self::Path(_) => MAX_PATHS,
            Self::CachedPath(_) => MAX_PATHS + MAX_CACHED_PATHS,
            Self::Vmms | Self::Target(_) | Self::Cid(_) => 0,
        }
    }
}

/// Whether the kernel's cache alone tells where a path leads, or that there is none; no file system
/// is asked. The path of a bound unix socket is in it. Always false before Linux 5.12.
fn is_cached(path: &Path) -> bool {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::CACHED);
    !matches!(found, Err(Errno::AGAIN | Errno::INVAL | Errno::NOSYS))
}

impl Workers {
    /// A pool of at most `most` threads of this name, at most `share` of which work for one party.
    pub(crate) fn new(reactor: &Reactor, name: &'static str, most: usize, share: usize) -> Self {
        let (reactor, pool) = (reactor.clone(), Mutex::default());
        Self(Arc::new(Shared { name, most, share, reactor, pool }))
    }

    /// Starts the thread that stays, unless it runs: from then on jobs are always done.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub(crate) fn start(&self) -> io::Result<()> {
        let mut pool = lock(&self.0.pool);
        if pool.is_ended || pool.token.is_some() {
            return Ok(());
        }
        let workers = Arc::downgrade(&self.0);
        let token = self.0.reactor.insert(Arc::new(move |_, _, _| {
            if let Some(shared) = workers.upgrade() {
                Self(shared).grow();
            }
        }))?;
        self.spawn(&mut pool).inspect_err(|_| self.0.reactor.remove(token))?;
        pool.token = Some(token);
        Ok(())
    }

    /// Does a job as soon as there is a thread for it. After [`Self::end`] it is dropped.
    pub(crate) fn run(&self, party: Party, job: impl FnOnce() + Send + 'static) {
        let mut pool = lock(&self.0.pool);
        if pool.is_ended {
            // A job that is dropped may close files, and that may block.
            drop(pool);
            return drop(job);
        }
        self.run_in(&mut pool, party, job);
    }

    /// Does a job that looks for a path, unless one for that path is there already or too many for
    /// others are; whether it does. One for a path that the kernel has in its cache does not wait
    /// for those that may hang.
    pub(crate) fn run_for_path(&self, path: &Path, job: impl FnOnce() + Send + 'static) -> bool {
        let mut hasher = DefaultHasher::new();
        path.hash(&mut hasher);
        let kind = if is_cached(path) { Party::CachedPath } else { Party::Path };
        self.look_up(kind(hasher.finish()), job)
    }

    fn look_up(&self, path: Party, job: impl FnOnce() + Send + 'static) -> bool {
        let mut pool = lock(&self.0.pool);
        let is_taken = pool.takes_path(path);
        if is_taken {
            self.run_in(&mut pool, path, job);
        }
        is_taken
    }

    fn run_in(&self, pool: &mut Pool, party: Party, job: impl FnOnce() + Send + 'static) {
        if pool.is_ended {
            return;
        }
        pool.queue.push_back((party, Box::new(job)));
        if pool.busy.get(&party).is_some_and(|busy| *busy >= self.0.share) {
            // One of the party's own threads does it.
            return;
        }
        if party.is_path() {
            // A thread that looks for another path does it, unless that one's file system hangs.
            if !pool.has_room(party, Instant::now()) {
                return self.grow_later(pool, HUNG);
            }
            // So does one that was woken for another path.
            if pool.queue.iter().filter(|(party, _)| party.is_path()).nth(1).is_some() {
                return self.grow_later(pool, GROW);
            }
        }
        match pool.idle.pop() {
            Some(thread) => thread.unpark(),
            None => self.grow_later(pool, GROW),
        }
    }

    /// Whether jobs wait that a free thread would do.
    pub(crate) fn are_wanted(&self) -> bool {
        lock(&self.0.pool).next(self.0.share, Instant::now()).is_some()
    }

    /// Drops all jobs that wait; threads end when they are done with the one that they have.
    pub(crate) fn end(&self) {
        let mut pool = lock(&self.0.pool);
        pool.is_ended = true;
        pool.idle.drain(..).for_each(|thread| thread.unpark());
        let token = pool.token.take();
        // What a job drops may use the pool.
        let queue = std::mem::take(&mut pool.queue);
        drop(pool);
        drop(queue);
        if let Some(token) = token {
            self.0.reactor.remove(token);
        }
    }

    #[cfg(test)]
    pub(crate) fn threads(&self) -> usize {
        lock(&self.0.pool).threads
    }

    fn grow_later(&self, pool: &mut Pool, pause: Duration) {
        let at = Instant::now() + pause;
        if let Some(token) = pool.token
            && pool.grows_at.is_none_or(|planned| at < planned)
        {
            pool.grows_at = Some(at);
            // It fails only for file descriptors.
            if let Err(error) = self.0.reactor.arm(token, None, Some(at)) {
                tracing::error!(%error, name = self.0.name, "no workers are added");
            }
        }
    }

    /// Adds a thread where jobs still wait for one.
    fn grow(&self) {
        let mut pool = lock(&self.0.pool);
        pool.grows_at = None;
        if pool.is_ended {
            return;
        }
        // Threads that were just started may all wait for more work before there is room for paths.
        let is_full = pool.idle.is_empty() && pool.threads >= self.0.most;
        if is_full || pool.next(self.0.share, Instant::now()).is_none() {
            let lookups = pool.lookups.len();
            if pool.queue.iter().any(|(party, _)| lookups < party.most_lookups()) {
                self.grow_later(&mut pool, HUNG);
            }
            return;
        }
        if let Some(thread) = pool.idle.pop() {
            thread.unpark();
        } else if let Err(error) = self.spawn(&mut pool) {
            // Those that there are do it, or the next attempt succeeds.
            tracing::debug!(%error, name = self.0.name, "cannot start a worker");
        }
        self.grow_later(&mut pool, GROW);
    }

    fn spawn(&self, pool: &mut Pool) -> io::Result<()> {
        let workers = self.clone();
        let thread = std::thread::Builder::new().name(self.0.name.into()).stack_size(STACK);
        thread.spawn(move || workers.work())?;
        pool.threads += 1;
        Ok(())
    }

    fn work(&self) {
        let me = std::thread::current();
        let mut idle_since = Instant::now();
        let mut pool = lock(&self.0.pool);
        while !pool.is_ended {
            if let Some((party, job)) = pool.take(self.0.share, Instant::now()) {
                drop(pool);
                if std::panic::catch_unwind(AssertUnwindSafe(job)).is_err() {
                    tracing::error!(name = self.0.name, ?party, "a worker's job has failed");
                }
                idle_since = Instant::now();
                pool = lock(&self.0.pool);
                pool.done(party);
                continue;
            }
            let left = IDLE.saturating_sub(idle_since.elapsed());
            let stays = pool.threads == 1;
            if left.is_zero() && !stays {
                break;
            }
            pool.idle.push(me.clone());
            drop(pool);
            if stays {
                std::thread::park();
            } else {
                std::thread::park_timeout(left);
            }
            pool = lock(&self.0.pool);
            pool.idle.retain(|thread| thread.id() != me.id());
        }
        pool.threads -= 1;
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").field("name", &self.0.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

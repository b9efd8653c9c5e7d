// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Work by many threads whose results come out in the order of the work. Threads take items in turn
//! and do not wait for each other, unless one is many items ahead of the output.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder};

use anyhow::{Context, Result, ensure};

/// Items of each thread that may be ahead of the output.
const AHEAD: usize = 8;

/// Results of an item that may wait for those before them.
const RESULTS: usize = 2;

/// Why there are no threads, and what to do.
const NO_THREAD: &str =
    "cannot start a thread: raise the limit of processes (ulimit -u, or pids.max of the cgroup)";

/// Where work leaves its results.
pub(crate) struct Sink<T>(SyncSender<Result<T>>);

impl<T> Sink<T> {
    /// Passes a result on. An error means that the results are not wanted any more.
    pub(crate) fn send(&self, result: T) -> Result<()> {
        ensure!(self.0.send(Ok(result)).is_ok(), "the output has ended");
        Ok(())
    }
}

struct Queue<I, T> {
    items: I,
    /// The results of each item that was taken, in order.
    results: VecDeque<Receiver<Result<T>>>,
    /// Threads that may still take one.
    working: usize,
    is_ended: bool,
}

struct Shared<I, T> {
    queue: Mutex<Queue<I, T>>,
    /// An item was taken, or a thread has ended.
    taken: Condvar,
    /// There is room for results, or the output has ended.
    room: Condvar,
}

impl<I, T> Shared<I, T> {
    fn queue(&self) -> MutexGuard<'_, Queue<I, T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a thread as working until it is dropped, also by a panic.
struct Working<'a, I, T>(&'a Shared<I, T>);

impl<'a, I, T> Working<'a, I, T> {
    fn new(shared: &'a Shared<I, T>) -> Self {
        shared.queue().working += 1;
        Self(shared)
    }
}

impl<I, T> Drop for Working<'_, I, T> {
    fn drop(&mut self) {
        self.0.queue().working -= 1;
        self.0.taken.notify_all();
    }
}

/// Ends the work when the output ends, also by an error or a panic.
struct Output<'a, I, T>(&'a Shared<I, T>);

impl<I, T> Drop for Output<'_, I, T> {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.is_ended = true;
        queue.results.clear();
        self.0.room.notify_all();
    }
}

/// Does `work` for each item in `threads` threads, or in fewer where the host starts no more.
/// `tell` gets the results in the order of items, and those of one item in the order in which they
/// were sent; it may end the work. The first error in this order ends it too.
pub(crate) fn in_order<I: Iterator + Send, T: Send>(
    threads: usize,
    items: I,
    work: impl Fn(I::Item, &Sink<T>) -> Result<()> + Sync,
    tell: impl FnMut(T) -> Result<ControlFlow<()>>,
) -> Result<()> {
    in_threads((0..threads).map(|_| Builder::new()), items, work, tell)
}

/// [`in_order`], in threads of these builders.
fn in_threads<I: Iterator + Send, T: Send>(
    threads: impl ExactSizeIterator<Item = Builder>,
    items: I,
    work: impl Fn(I::Item, &Sink<T>) -> Result<()> + Sync,
    mut tell: impl FnMut(T) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let queue = Queue { items, results: VecDeque::new(), working: 0, is_ended: false };
    let shared = Shared { queue: Mutex::new(queue), taken: Condvar::new(), room: Condvar::new() };
    let limit = threads.len() * AHEAD;
    thread::scope(|scope| {
        let _output = Output(&shared);
        for (number, builder) in threads.enumerate() {
            let (shared, work) = (&shared, &work);
            let working = Working::new(shared);
            let started = builder.spawn_scoped(scope, move || {
                let _working = working;
                while let Some((item, sink)) = take(shared, limit) {
                    if let Err(error) = work(item, &sink) {
                        // Not received where the output has ended.
                        let _ = sink.0.send(Err(error));
                    }
                }
            });
            match started {
                Ok(_) => {}
                Err(error) if number == 0 => return Err(error).context(NO_THREAD),
                // Those that were started have more to do.
                Err(_) => break,
            }
        }
        while let Some(results) = next(&shared) {
            for result in results {
                if tell(result?)?.is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    })
}

/// The next item, and where its results go; `None` at the end.
fn take<I: Iterator, T>(shared: &Shared<I, T>, limit: usize) -> Option<(I::Item, Sink<T>)> {
    let is_full = |queue: &mut Queue<I, T>| queue.results.len() >= limit && !queue.is_ended;
    let mut queue =
        shared.room.wait_while(shared.queue(), is_full).unwrap_or_else(PoisonError::into_inner);
    if queue.is_ended {
        return None;
    }
    let item = queue.items.next()?;
    let (sender, receiver) = sync_channel(RESULTS);
    queue.results.push_back(receiver);
    shared.taken.notify_all();
    Some((item, Sink(sender)))
}

/// The results of the next item; `None` where all threads have ended.
fn next<I, T>(shared: &Shared<I, T>) -> Option<Receiver<Result<T>>> {
    let is_waiting = |queue: &mut Queue<I, T>| queue.results.is_empty() && queue.working > 0;
    let mut queue =
        shared.taken.wait_while(shared.queue(), is_waiting).unwrap_or_else(PoisonError::into_inner);
    let results = queue.results.pop_front();
    shared.room.notify_one();
    results
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn results_come_in_the_order_of_items() {
        for threads in [1, 2, 7] {
            let mut all = Vec::new();
            let work = |item: usize, sink: &Sink<(usize, usize)>| {
                // Some have no result, some have more than may wait.
                (0..item % 7).try_for_each(|number| sink.send((item, number)))
            };
            in_order(threads, 0..500, work, |result| {
                all.push(result);
                Ok(ControlFlow::Continue(()))
            })
            .unwrap();
            let expected: Vec<_> =
                (0..500).flat_map(|item| (0..item % 7).map(move |number| (item, number))).collect();
            assert_eq!(all, expected);
        }
    }

    #[test]
    fn fewer_threads_do_the_work_where_the_host_starts_no_more() {
        // No host has memory for such a stack.
        let builder = |starts: bool| match starts {
            true => Builder::new(),
            false => Builder::new().stack_size(1 << 60),
        };
        let work = |item: usize, sink: &Sink<usize>| sink.send(item);
        for started in 0..3 {
            let mut all = Vec::new();
            let threads = (0..3).map(|number| builder(number < started));
            let result = in_threads(threads, 0..500, work, |item| {
                all.push(item);
                Ok(ControlFlow::Continue(()))
            });
            if started == 0 {
                assert_eq!(result.unwrap_err().to_string(), NO_THREAD);
            } else {
                result.unwrap();
                assert_eq!(all, (0..500).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn no_thread_is_far_ahead_of_the_output() {
        let (taken, told) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let work = |_, sink: &Sink<()>| {
            let ahead = taken.fetch_add(1, Ordering::SeqCst)
                - told.load(Ordering::SeqCst).min(taken.load(Ordering::SeqCst));
            // Those that wait, the one that is told, and those at work.
            assert!(ahead <= 2 * AHEAD + 3, "{ahead}");
            sink.send(())
        };
        in_order(2, 0..2000, work, |()| {
            told.fetch_add(1, Ordering::SeqCst);
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
    }

    #[test]
    fn the_first_error_and_the_output_end_the_work() {
        let count = AtomicUsize::new(0);
        let work = |item: usize, sink: &Sink<usize>| {
            count.fetch_add(1, Ordering::SeqCst);
            anyhow::ensure!(item != 5 && item != 4, "lost {item}");
            sink.send(item)
        };
        for threads in [1, 3] {
            let mut last = None;
            let error = in_order(threads, 0.., work, |item| {
                last = Some(item);
                Ok(ControlFlow::Continue(()))
            });
            assert_eq!((error.unwrap_err().to_string(), last), ("lost 4".into(), Some(3)));
            in_order(threads, 0.., work, |_| Ok(ControlFlow::Break(()))).unwrap();
            let error = in_order(threads, 0.., work, |_| anyhow::bail!("no room"));
            assert_eq!(error.unwrap_err().to_string(), "no room");
        }
        assert!(count.into_inner() < 1000);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shares, growth and the end of a pool.

use std::sync::mpsc;

use super::*;
use crate::test_wait::wait_for;

/// How long anything may take on a slow machine.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn one_party_takes_its_share_and_no_more() {
    let reactor = Reactor::default();
    let workers = Workers::new(&reactor, "test", 4, 2);
    workers.start().unwrap();
    let (done, are_done) = mpsc::channel();
    let (free, is_free) = mpsc::channel::<()>();
    let is_free = Arc::new(Mutex::new(is_free));
    // Jobs that do not end.
    for _ in 0..10 {
        let (done, is_free) = (done.clone(), Arc::clone(&is_free));
        workers.run(Party::Target(1), move || {
            done.send(1).unwrap();
            let _ = is_free.lock().unwrap().recv();
        });
    }
    assert_eq!([are_done.recv_timeout(LIMIT), are_done.recv_timeout(LIMIT)], [Ok(1), Ok(1)]);
    for _ in 0..100 {
        let done = done.clone();
        workers.run(Party::Target(2), move || done.send(2).unwrap());
    }
    for _ in 0..100 {
        assert_eq!(are_done.recv_timeout(LIMIT), Ok(2));
    }
    assert!(workers.threads() <= 4);
    drop(free);
    for _ in 0..8 {
        assert_eq!(are_done.recv_timeout(LIMIT), Ok(1));
    }
    workers.end();
    reactor.end();
}

/// Of two parties, the one without a thread goes first.
#[test]
fn the_party_with_the_fewest_threads_is_next() {
    let (mut pool, now) = (Pool::default(), Instant::now());
    let parties = [1, 1, 1, 2, 1, 2].map(Party::Target);
    pool.queue.extend(parties.map(|party| (party, Box::new(|| {}) as Job)));
    let taken: Vec<Party> =
        std::iter::from_fn(|| pool.take(2, now)).map(|(party, _)| party).collect();
    assert_eq!(taken, [1, 2, 1, 2].map(Party::Target));
    pool.done(Party::Target(1));
    assert_eq!(pool.take(2, now).map(|(party, _)| party), Some(Party::Target(1)));
    assert!(pool.take(2, now).is_none() && pool.queue.len() == 1);
}

#[test]
fn all_but_one_end_when_there_is_no_work() {
    let reactor = Reactor::default();
    let workers = Workers::new(&reactor, "test", 8, 8);
    workers.start().unwrap();
    let (free, is_free) = mpsc::channel::<()>();
    let is_free = Arc::new(Mutex::new(is_free));
    let (begun, have_begun) = mpsc::channel();
    for _ in 0..8 {
        let (begun, is_free) = (begun.clone(), Arc::clone(&is_free));
        workers.run(Party::Target(0), move || {
            begun.send(()).unwrap();
            drop(is_free.lock().map(|is_free| is_free.recv()));
        });
    }
    (0..8).for_each(|_| have_begun.recv_timeout(LIMIT).unwrap());
    assert_eq!(workers.threads(), 8);
    drop(free);
    wait_for("all but one end", || workers.threads() == 1);
    // The last one is there for more.
    workers.run(Party::Target(0), move || begun.send(()).unwrap());
    have_begun.recv_timeout(LIMIT).unwrap();
    let shared = Arc::downgrade(&workers.0);
    workers.end();
    workers.run(Party::Target(0), || panic!("it has ended"));
    drop(workers);
    wait_for("its threads end", || shared.strong_count() == 0);
    reactor.end();
}

#[test]
fn a_job_that_fails_leaves_its_share() {
    let reactor = Reactor::default();
    let workers = Workers::new(&reactor, "test", 1, 1);
    workers.start().unwrap();
    let (done, is_done) = mpsc::channel();
    workers.run(Party::Target(1), || panic!("on purpose"));
    workers.run(Party::Target(1), move || done.send(()).unwrap());
    assert_eq!(is_done.recv_timeout(LIMIT), Ok(()));
    workers.end();
    reactor.end();
}

#[test]
fn a_path_that_is_looked_for_without_end_holds_up_no_other() {
    let reactor = Reactor::default();
    let workers = Workers::new(&reactor, "test", MAX_PATHS + 1, 1);
    workers.start().unwrap();
    let (free, is_free) = mpsc::channel::<()>();
    let is_free = Arc::new(Mutex::new(is_free));
    let hang = |path: u64| {
        let is_free = Arc::clone(&is_free);
        workers.look_up(Party::Path(path), move || drop(is_free.lock().map(|it| it.recv())))
    };
    assert!(hang(0) && !hang(0));
    assert!((1..MAX_PATHS as u64).all(hang));
    // Each begins, as those before it have hung for a while.
    wait_for("they run beside each other", || lock(&workers.0.pool).lookups.len() >= MAX_PATHS);
    // More would take the last threads; those that wait are not too many.
    assert!((0..MAX_WAITING_PATHS as u64).all(|number| hang(1_000 + number)));
    assert!(!hang(0) && !hang(1_000) && !hang(9_999));
    let (done, is_done) = mpsc::channel();
    workers.run(Party::Target(1), move || done.send(()).unwrap());
    assert_eq!(is_done.recv_timeout(LIMIT), Ok(()));
    // A path that is in the kernel's cache may be looked for, also several times at once.
    let (found, is_found) = mpsc::channel();
    for _ in 0..3 {
        let found = found.clone();
        assert!(workers.look_up(Party::CachedPath(0), move || found.send(()).unwrap()));
    }
    (0..3).for_each(|_| is_found.recv_timeout(LIMIT).unwrap());
    wait_for("its job ends", || lock(&workers.0.pool).lookups.len() <= MAX_PATHS);
    assert!(!workers.are_wanted());
    assert_eq!(lock(&workers.0.pool).lookups.len(), MAX_PATHS);
    drop(free);
    wait_for("its thread ends", || workers.look_up(Party::Path(0), || {}));
    workers.end();
    reactor.end();
}

/// Its threads may have been started just now: they find no room for the path, and wait for more
/// work.
#[test]
fn a_full_pool_looks_again_whether_there_is_room_for_a_path() {
    let reactor = Reactor::default();
    let workers = Workers::new(&reactor, "test", 1, 1);
    workers.start().unwrap();
    let (began, has_begun) = mpsc::channel();
    let (end, is_over) = mpsc::channel::<()>();
    workers.run(Party::Target(1), move || {
        began.send(()).unwrap();
        let _ = is_over.recv();
    });
    has_begun.recv_timeout(LIMIT).unwrap();
    let (found, is_found) = mpsc::channel();
    assert!(workers.look_up(Party::Path(0), move || found.send(()).unwrap()));
    workers.grow();
    assert!(lock(&workers.0.pool).grows_at.is_some());
    drop(end);
    is_found.recv_timeout(LIMIT).unwrap();
    workers.end();
    reactor.end();
}

/// Hooks to many paths are tried again at one time: four threads do that, unless some hang.
#[test]
fn few_threads_look_for_paths_at_a_time() {
    let (mut pool, now) = (Pool::default(), Instant::now());
    let parties = (0..100).map(Party::Path);
    pool.queue.extend(parties.map(|party| (party, Box::new(|| {}) as Job)));
    let taken = |pool: &mut Pool, now| {
        std::iter::from_fn(|| pool.take(1, now)).map(|(party, _)| party).collect::<Vec<_>>()
    };
    let first = taken(&mut pool, now);
    assert_eq!(first.len(), MAX_NEW_PATHS);
    first.iter().for_each(|party| pool.done(*party));
    for round in 1..=MAX_PATHS / MAX_NEW_PATHS {
        let now = now + HUNG * u32::try_from(round).unwrap();
        assert_eq!(taken(&mut pool, now).len(), MAX_NEW_PATHS);
    }
    assert_eq!(taken(&mut pool, now + 100 * HUNG), []);
    // Others have the threads that are left.
    pool.queue.push_back((Party::Target(1), Box::new(|| {})));
    assert_eq!(taken(&mut pool, now), [Party::Target(1)]);
}

#[test]
fn a_bound_socket_s_path_is_in_the_kernel_s_cache() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tool.sock");
    let _tool = std::os::unix::net::UnixListener::bind(&path).unwrap();
    // Not before Linux 5.12.
    let says = openat2(CWD, "/", OFlags::PATH, Mode::empty(), ResolveFlags::CACHED).is_ok();
    // What happens elsewhere in the file system may keep the kernel from saying so once.
    wait_for("it is in the cache", || !says || is_cached(&path));
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shares, growth and the end of a pool.

use std::sync::mpsc;

use super::*;

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
    let mut pool = Pool::default();
    let parties = [1, 1, 1, 2, 1, 2].map(Party::Target);
    pool.queue.extend(parties.map(|party| (party, Box::new(|| {}) as Job)));
    let taken: Vec<Party> = std::iter::from_fn(|| pool.take(2)).map(|(party, _)| party).collect();
    assert_eq!(taken, [1, 2, 1, 2].map(Party::Target));
    pool.done(Party::Target(1));
    assert_eq!(pool.take(2).map(|(party, _)| party), Some(Party::Target(1)));
    assert!(pool.take(2).is_none() && pool.queue.len() == 1);
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
    let deadline = Instant::now() + LIMIT;
    while workers.threads() > 1 {
        assert!(Instant::now() < deadline, "they stay");
        std::thread::sleep(Duration::from_millis(5));
    }
    // The last one is there for more.
    workers.run(Party::Target(0), move || begun.send(()).unwrap());
    have_begun.recv_timeout(LIMIT).unwrap();
    let shared = Arc::downgrade(&workers.0);
    workers.end();
    workers.run(Party::Target(0), || panic!("it has ended"));
    drop(workers);
    while shared.strong_count() > 0 {
        assert!(Instant::now() < deadline, "its threads do not end");
        std::thread::sleep(Duration::from_millis(5));
    }
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
    let hang = |path: &str| {
        let is_free = Arc::clone(&is_free);
        workers.run_for_path(Path::new(path), move || drop(is_free.lock().map(|it| it.recv())))
    };
    assert!(hang("/0") && !hang("/0"));
    assert!((1..MAX_PATHS).all(|number| hang(&format!("/{number}"))));
    assert!(!hang("/more"), "it would take the last threads");
    let (done, is_done) = mpsc::channel();
    workers.run(Party::Target(1), move || done.send(()).unwrap());
    assert_eq!(is_done.recv_timeout(LIMIT), Ok(()));
    assert!(!workers.are_wanted());
    drop(free);
    let deadline = Instant::now() + LIMIT;
    while !workers.run_for_path(Path::new("/0"), || {}) {
        assert!(Instant::now() < deadline, "its thread does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    workers.end();
    reactor.end();
}

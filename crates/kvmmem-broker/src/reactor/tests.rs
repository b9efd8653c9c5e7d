// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The reactor with pipes, and its table with a clock of the test's own.

use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use super::*;
use crate::test_peer::lingering;
use crate::test_wait::wait_for;

/// How long anything may take on a slow machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A handler that sends its token and event, and its receiver.
fn recorder() -> (Handler, Receiver<(Token, Event)>) {
    let (sender, events) = mpsc::channel();
    (record(&sender), events)
}

fn record(sender: &Sender<(Token, Event)>) -> Handler {
    let sender = sender.clone();
    Arc::new(move |_, token, event| sender.send((token, event)).unwrap())
}

/// A pipe's readable end, and its other end.
fn pipe() -> (Arc<OwnedFd>, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    (Arc::new(reader), writer)
}

/// Has a reactor's thread wait until what is returned is dropped.
pub(crate) fn hold(reactor: &Reactor) -> Sender<()> {
    let (free, is_free) = mpsc::channel::<()>();
    let is_free = Mutex::new(is_free);
    let (held, is_held) = mpsc::channel();
    let handler = Arc::new(move |_: &Reactor, _, _| {
        held.send(()).unwrap();
        let _ = is_free.lock().unwrap().recv();
    });
    let token = reactor.insert(handler).unwrap();
    reactor.arm(token, None, Some(Instant::now())).unwrap();
    is_held.recv_timeout(LIMIT).unwrap();
    free
}

/// Whether a reactor's thread calls a new handler in time.
pub(crate) fn is_alive(reactor: &Reactor) -> bool {
    let (sender, events) = mpsc::channel();
    let reactor = reactor.clone();
    // It may wait for a lock.
    std::thread::spawn(move || {
        let token = reactor.insert(record(&sender)).unwrap();
        reactor.arm(token, None, Some(Instant::now())).unwrap();
    });
    events.recv_timeout(LIMIT).is_ok()
}

fn fill(writer: &OwnedFd) {
    assert_eq!(rustix::io::write(writer, b"x").unwrap(), 1);
}

#[test]
fn a_registration_waits_once_each_time_it_is_armed() {
    let reactor = Reactor::default();
    let (handler, events) = recorder();
    let (reader, writer) = pipe();
    let token = reactor.insert(handler).unwrap();
    fill(&writer);
    for _ in 0..3 {
        reactor.arm(token, Some((&reader, READABLE)), None).unwrap();
        assert_eq!(events.recv_timeout(LIMIT), Ok((token, Event::Ready)));
        assert!(events.try_recv().is_err());
    }
    // A deadline that passes first, and what becomes ready later calls nothing.
    let (silent, writer) = pipe();
    reactor.arm(token, Some((&silent, READABLE)), Some(Instant::now())).unwrap();
    assert_eq!(events.recv_timeout(LIMIT), Ok((token, Event::Deadline)));
    fill(&writer);
    let (handler, others) = recorder();
    let other = reactor.insert(handler).unwrap();
    reactor.arm(other, Some((&reader, READABLE)), None).unwrap();
    assert_eq!(others.recv_timeout(LIMIT), Ok((other, Event::Ready)));
    assert!(events.try_recv().is_err());
    // It was ready all the time.
    reactor.arm(token, Some((&silent, READABLE)), None).unwrap();
    assert_eq!(events.recv_timeout(LIMIT), Ok((token, Event::Ready)));
    reactor.end();
}

#[test]
fn a_deadline_is_moved_and_met() {
    let reactor = Reactor::default();
    let (handler, events) = recorder();
    let token = reactor.insert(handler).unwrap();
    reactor.arm(token, None, Some(Instant::now() + 100 * LIMIT)).unwrap();
    // The thread sleeps by now, or not yet; it is woken in either case.
    reactor.arm(token, None, Some(Instant::now() + Duration::from_millis(20))).unwrap();
    assert_eq!(events.recv_timeout(LIMIT), Ok((token, Event::Deadline)));
    assert!(lock(&reactor.0.table).deadlines.is_empty());
    reactor.end();
}

#[test]
fn a_late_event_reaches_no_other_registration() {
    let reactor = Reactor::default();
    let (sender, events) = mpsc::channel();
    let (silent, writer) = pipe();
    let others = Arc::new(Mutex::new(Vec::new()));
    // Of two registrations that are ready in one turn, the first to be called removes the other,
    // and makes a new one in its slot.
    let first = {
        let (others, silent, sender) = (Arc::clone(&others), Arc::clone(&silent), sender.clone());
        Arc::new(move |reactor: &Reactor, token, _| {
            let tokens: Vec<Token> = std::mem::take(&mut *others.lock().unwrap());
            for other in tokens.into_iter().filter(|other| *other != token) {
                reactor.remove(other);
                let new = reactor.insert(record(&sender)).unwrap();
                assert!(new.slot() == other.slot() && new != other);
                reactor.arm(new, Some((&silent, READABLE)), None).unwrap();
                sender.send((new, Event::Deadline)).unwrap();
            }
        })
    };
    // Until both are ready.
    let free = hold(&reactor);
    let pipes = [pipe(), pipe()];
    for (reader, writer) in &pipes {
        let token = reactor.insert(Arc::clone(&first) as Handler).unwrap();
        others.lock().unwrap().push(token);
        fill(writer);
        reactor.arm(token, Some((reader, READABLE)), None).unwrap();
    }
    drop(free);
    let (new, made) = events.recv_timeout(LIMIT).unwrap();
    assert_eq!(made, Event::Deadline);
    // What comes next for it is its own.
    let (handler, later) = recorder();
    let token = reactor.insert(handler).unwrap();
    reactor.arm(token, None, Some(Instant::now())).unwrap();
    later.recv_timeout(LIMIT).unwrap();
    assert!(events.try_recv().is_err());
    fill(&writer);
    assert_eq!(events.recv_timeout(LIMIT), Ok((new, Event::Ready)));
    reactor.end();
}

#[test]
fn a_flood_starves_no_other_registration() {
    let reactor = Reactor::default();
    let (flood, writer) = pipe();
    fill(&writer);
    for _ in 0..4 {
        let flood = Arc::new(rustix::io::dup(&*flood).unwrap());
        let again = Arc::clone(&flood);
        let token = reactor
            .insert(Arc::new(move |reactor: &Reactor, token, _| {
                let now = Some(Instant::now());
                reactor.arm(token, Some((&again, READABLE)), now).unwrap();
            }))
            .unwrap();
        reactor.arm(token, Some((&flood, READABLE)), None).unwrap();
    }
    let (handler, events) = recorder();
    let token = reactor.insert(handler).unwrap();
    let (reader, writer) = pipe();
    for _ in 0..50 {
        reactor.arm(token, Some((&reader, READABLE)), None).unwrap();
        fill(&writer);
        assert_eq!(events.recv_timeout(LIMIT), Ok((token, Event::Ready)));
        rustix::io::read(&*reader, &mut [0; 1]).unwrap();
        reactor.arm(token, None, Some(Instant::now())).unwrap();
        assert_eq!(events.recv_timeout(LIMIT), Ok((token, Event::Deadline)));
    }
    reactor.end();
}

#[test]
fn deadlines_pass_in_order() {
    let mut table = Table::default();
    let (handler, _events) = recorder();
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut arm = |deadline| {
        let token = table.insert(|_| Arc::clone(&handler)).unwrap();
        let registration = table.get(token).unwrap();
        (registration.is_armed, registration.deadline) = (true, Some(deadline));
        table.deadlines.insert((deadline, token));
        token
    };
    let [third, first, fourth, second] = [at(3), at(1), at(4), at(1)].map(&mut arm);
    let mut due = |now| table.fire_due(now).map(|(token, _)| token);
    assert_eq!(due(at(0)), None);
    assert_eq!([due(at(2)), due(at(2)), due(at(2))], [Some(first), Some(second), None]);
    assert!(table.remove(third).is_some() && table.remove(third).is_none());
    let mut due = |now| table.fire_due(now).map(|(token, _)| token);
    assert_eq!([due(at(9)), due(at(9))], [Some(fourth), None]);
}

#[test]
fn its_end_drops_the_handlers_and_the_thread() {
    let reactor = Reactor::default();
    let (handler, events) = recorder();
    let (reader, _writer) = pipe();
    let token = reactor.insert(handler).unwrap();
    reactor.arm(token, Some((&reader, READABLE)), None).unwrap();
    let shared = Arc::downgrade(&reactor.0);
    reactor.end();
    assert_eq!(events.recv_timeout(LIMIT), Err(mpsc::RecvTimeoutError::Disconnected));
    reactor.arm(token, Some((&reader, READABLE)), None).unwrap();
    reactor.remove(token);
    assert!(reactor.insert(Arc::new(|_, _, _| {})).is_err());
    drop(reactor);
    wait_for("the thread ends", || shared.strong_count() == 0);
}

#[test]
fn a_handler_that_fails_ends_nothing_else() {
    let reactor = Reactor::default();
    let (reader, writer) = pipe();
    fill(&writer);
    let bad = reactor.insert(Arc::new(|_, _, _| panic!("on purpose"))).unwrap();
    reactor.arm(bad, Some((&reader, READABLE)), None).unwrap();
    let (handler, events) = recorder();
    let good = reactor.insert(handler).unwrap();
    reactor.arm(good, None, Some(Instant::now() + Duration::from_millis(10))).unwrap();
    assert_eq!(events.recv_timeout(LIMIT), Ok((good, Event::Deadline)));
    // It may be armed again.
    reactor.arm(bad, None, Some(Instant::now())).unwrap();
    reactor.arm(good, None, Some(Instant::now() + Duration::from_millis(10))).unwrap();
    assert_eq!(events.recv_timeout(LIMIT), Ok((good, Event::Deadline)));
    reactor.end();
}

#[test]
fn a_socket_that_takes_long_to_close_holds_up_no_other_registration() {
    let reactor = Reactor::default();
    let (file, other_end) = lingering();
    let file = Arc::new(OwnedFd::from(file));
    let closing = Arc::downgrade(&file);
    let (handler, _events) = recorder();
    let token = reactor.insert(handler).unwrap();
    reactor.arm(token, Some((&file, READABLE)), None).unwrap();
    drop(file);
    std::thread::scope(|scope| {
        scope.spawn(|| reactor.arm(token, None, None).unwrap());
        wait_for("the socket to be closed", || closing.strong_count() == 0);
        let is_alive = is_alive(&reactor);
        drop(other_end);
        assert!(is_alive);
    });
    reactor.end();
}

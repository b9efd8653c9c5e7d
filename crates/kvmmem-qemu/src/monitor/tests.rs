// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a QEMU may do to a monitor and its users.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use rustix::net::SendFlags;
use rustix::net::sockopt::set_socket_linger;
use serde_json::json;

use super::*;
use crate::fake_qemu::Fake;
use crate::monitors::Monitors;
use crate::qmp::MAX_EVENTS;
use crate::qmp::tests::{GREETING, READY, flooded, serve};

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Counts events, and keeps all but those of a flood.
#[derive(Default)]
struct Ear {
    events: AtomicUsize,
    others: Mutex<Vec<(MonitorEvent, Counts)>>,
}

impl Subscriber for Ear {
    fn notify(&self, event: &MonitorEvent, counts: Counts) {
        match event {
            MonitorEvent::Qmp(_) => drop(self.events.fetch_add(1, Ordering::Relaxed)),
            other => lock(&self.others).push((other.clone(), counts)),
        }
    }
}

/// Does each job on a thread of its own.
pub(crate) fn threads() -> Arc<Run> {
    Arc::new(|job| std::thread::Builder::new().spawn(job).map(drop))
}

fn monitor(
    qmp: Option<Qmp>,
    find: impl Fn() -> Option<Qmp> + Send + Sync + 'static,
) -> (Arc<Monitor>, Arc<Ear>) {
    let monitor = Monitor::new("/run/qmp".into(), qmp);
    let ear = Arc::new(Ear::default());
    monitor.subscribe(subscriber(&ear), find, Duration::from_secs(1), threads());
    (monitor, ear)
}

fn subscriber(ear: &Arc<Ear>) -> Weak<dyn Subscriber> {
    Arc::downgrade(ear) as Weak<dyn Subscriber>
}

/// Steps until a condition holds.
#[track_caller]
fn step_until(monitor: &Arc<Monitor>, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "still waiting");
        monitor.step();
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends a command; its result comes here.
fn send(monitor: &Monitor) -> mpsc::Receiver<Result<Value, QmpError>> {
    let (reply, result) = mpsc::channel();
    let read = |answer: Box<RawValue>| serde_json::from_str(answer.get()).unwrap();
    monitor.send("stop", &json!({}), move |answer| reply.send(answer.map(read)).unwrap());
    result
}

/// Steps until there is a result.
#[track_caller]
fn result(
    monitor: &Arc<Monitor>,
    result: &mpsc::Receiver<Result<Value, QmpError>>,
) -> Result<Value, QmpError> {
    let began = Instant::now();
    loop {
        assert!(began.elapsed() < PATIENCE, "still waiting");
        monitor.step();
        if let Ok(result) = result.recv_timeout(Duration::from_millis(1)) {
            return result;
        }
    }
}

#[test]
fn events_without_end_are_taken_in_turns() {
    let (_directory, qmp) = flooded("{\"event\":\"RESET\",\"data\":{\"device\":\"d\"}}\n");
    let (monitor, ear) = monitor(Some(qmp), || None);
    let (mut turns, mut before) = (0, 0);
    while turns < 10 {
        turns += usize::from(monitor.step().is_behind);
        let events = ear.events.load(Ordering::Relaxed);
        assert!(events - before <= MAX_EVENTS, "{events}");
        before = events;
    }
    assert_eq!(monitor.counts().resets, before as u64);
    // No command gets its answer, and none is waited for longer than others.
    let (first, second) = (send(&monitor), send(&monitor));
    assert!(matches!(result(&monitor, &first), Err(QmpError::TooMuch(_))));
    assert!(matches!(result(&monitor, &second), Err(QmpError::Down(_))));
    assert!(matches!(result(&monitor, &send(&monitor)), Err(QmpError::Down(_))));
    let counts = monitor.counts();
    assert_eq!(counts.losses, 1);
    assert_eq!(*lock(&ear.others), [(MonitorEvent::Lost, counts)]);
    assert!(monitor.socket().is_none() && monitor.lend().is_err());
}

#[test]
fn lines_without_meaning_are_counted_as_events_are() {
    let (_directory, qmp) = flooded("{}\n");
    let (monitor, ear) = monitor(Some(qmp), || None);
    while !monitor.step().is_behind {}
    let refused = result(&monitor, &send(&monitor));
    assert!(matches!(refused, Err(QmpError::TooMuch(_))), "{refused:?}");
    // What is no name of an event is not kept.
    let long = "x".repeat(1000);
    let (_directory, qmp) = flooded(&format!("{{\"event\":\"{long}\"}}\n"));
    let (monitor, _ear) = self::monitor(Some(qmp), || None);
    while !monitor.step().is_behind {}
    assert_eq!(ear.events.load(Ordering::Relaxed), 0);
}

#[test]
fn a_command_that_is_not_answered_costs_the_connection_and_a_new_one_is_made() {
    let ready = || vec![GREETING.to_owned(), READY.to_owned()];
    let (_directory, path, _qemu) = serve(ready());
    let (_second_directory, second, _second_qemu) =
        serve([ready(), vec!["{\"return\":{\"status\":\"running\"}}\n".to_owned()]].concat());
    let qmp = Qmp::connect(&path).unwrap();
    let (monitor, ear) = monitor(Some(qmp), move || Qmp::connect(&second).ok());
    let mut lent = monitor.lend().unwrap();
    // No other thread steps: the one that waits does when the command is due.
    assert!(matches!(lent.status(), Err(QmpError::Silent(_))));
    step_until(&monitor, || lock(&ear.others).len() == 2);
    let heard: Vec<MonitorEvent> =
        lock(&ear.others).iter().map(|(event, _)| event.clone()).collect();
    assert_eq!(heard, [MonitorEvent::Lost, MonitorEvent::Found]);
    // What was lent is of the old connection.
    assert!(lent.status().is_err());
    let mut lent = monitor.lend().unwrap();
    let stepped = Arc::clone(&monitor);
    let status = std::thread::spawn(move || lent.status());
    step_until(&stepped, || status.is_finished());
    assert_eq!(status.join().unwrap().unwrap(), "running");
}

#[test]
fn an_answer_to_no_command_costs_the_connection() {
    let (_directory, path, _qemu) =
        serve(vec![GREETING.into(), format!("{READY}{{\"return\":{{}}}}\n")]);
    let (monitor, ear) = monitor(Some(Qmp::connect(&path).unwrap()), || None);
    step_until(&monitor, || !lock(&ear.others).is_empty());
    assert!(!monitor.is_up());
}

#[test]
fn a_long_line_that_answers_no_command_costs_the_connection() {
    let long = "x".repeat(MAX_SHORT);
    let event = format!("{{\"event\":\"X\",\"data\":{{\"x\":\"{long}\"}}}}\n");
    let (_directory, path, _qemu) = serve(vec![GREETING.into(), format!("{READY}{event}")]);
    let (monitor, ear) = monitor(Some(Qmp::connect(&path).unwrap()), || None);
    step_until(&monitor, || !monitor.is_up());
    assert_eq!(lock(&ear.others).last().map(|(event, _)| event), Some(&MonitorEvent::Lost));
    // A command whose answer is waited for may have a long one.
    let answer = format!("{{\"return\":\"{long}\"}}\n");
    let (_directory, path, _qemu) = serve(vec![GREETING.into(), READY.into(), answer]);
    let (monitor, _ear) = self::monitor(Some(Qmp::connect(&path).unwrap()), || None);
    let mut lent = monitor.lend().unwrap();
    let stepped = Arc::clone(&monitor);
    let answer = std::thread::spawn(move || lent.execute("human-monitor-command", json!({})));
    step_until(&stepped, || answer.is_finished());
    assert_eq!(answer.join().unwrap().unwrap(), json!(long));
}

#[test]
fn two_users_have_one_connection_which_ends_with_the_last_of_them() {
    let (_directory, path, qemu) = serve(vec![GREETING.into(), READY.into()]);
    let monitors = Monitors::default();
    let monitor = monitors.of(&path, Some(monitors.connect(&path).unwrap()));
    let [ear, other] = [(); 2].map(|()| Arc::new(Ear::default()));
    for ear in [&ear, &other] {
        // A later user has the same connection.
        let lent = monitors.connect(&path).unwrap();
        assert!(Arc::ptr_eq(&monitors.of(&path, Some(lent)), &monitor));
        monitor.subscribe(subscriber(ear), || None, Duration::from_secs(1), threads());
    }
    monitor.unsubscribe(&subscriber(&ear));
    assert!(monitor.is_up());
    let command = send(&monitor);
    monitor.unsubscribe(&subscriber(&other));
    assert!(matches!(command.recv().unwrap(), Err(QmpError::Down(_))));
    qemu.join().unwrap();
    assert_eq!(monitor.step(), Step { until: None, is_behind: false });
}

#[test]
fn a_user_that_comes_after_the_end_has_a_connection_again() {
    let fake = Fake::start("running");
    let monitors = Monitors::default();
    let subscribe = |monitor: &Arc<Monitor>, ear: &Arc<Ear>| {
        let path = fake.path.clone();
        let find = move || Qmp::connect(&path).ok();
        monitor.subscribe(subscriber(ear), find, Duration::from_secs(1), threads());
    };
    let [ear, other] = [(); 2].map(|()| Arc::new(Ear::default()));
    let monitor = monitors.of(&fake.path, Some(monitors.connect(&fake.path).unwrap()));
    subscribe(&monitor, &ear);
    // Another user is about to come when the last one goes.
    let expected = monitors.of(&fake.path, None);
    monitor.unsubscribe(&subscriber(&ear));
    assert!(!monitor.is_up());
    // A third one has the same monitor, as QEMU serves one connection.
    assert!(Arc::ptr_eq(&monitors.of(&fake.path, None), &expected));
    subscribe(&expected, &other);
    step_until(&expected, || expected.is_up());
    assert_eq!(result(&expected, &send(&expected)).unwrap(), json!({}));
    expected.unsubscribe(&subscriber(&other));
    assert!(!expected.is_up());
    // Where the user that comes has a connection already, that is used.
    let again = monitors.of(&fake.path, Some(monitors.connect(&fake.path).unwrap()));
    assert!(Arc::ptr_eq(&again, &expected) && again.is_up());
}

#[test]
fn a_connection_that_is_lent_ends_after_the_last_user_and_the_loan() {
    let fake = Fake::start("running");
    let (monitor, ear) = monitor(Some(Qmp::connect(&fake.path).unwrap()), || None);
    let mut lent = [(); 2].map(|()| monitor.lend().unwrap());
    monitor.unsubscribe(&subscriber(&ear));
    // No user steps any more: the one that waits does.
    for lent in &mut lent {
        assert_eq!(lent.status().unwrap(), "running");
    }
    let [first, second] = lent;
    drop(first);
    assert!(monitor.is_up());
    drop(second);
    assert!(!monitor.is_up());
    assert_eq!(monitor.step(), Step { until: None, is_behind: false });
}

#[test]
fn a_loan_that_ends_before_there_is_a_user_ends_no_connection() {
    let fake = Fake::start("running");
    let monitors = Monitors::default();
    let monitor = monitors.of(&fake.path, Some(monitors.connect(&fake.path).unwrap()));
    drop(monitor.lend().unwrap());
    assert!(monitor.is_up());
    let ear = Arc::new(Ear::default());
    monitor.subscribe(subscriber(&ear), || None, Duration::from_secs(1), threads());
    let lent = monitors.connect(&fake.path).unwrap();
    monitor.unsubscribe(&subscriber(&ear));
    // The one that has it is a user soon.
    assert!(Arc::ptr_eq(&monitors.of(&fake.path, Some(lent)), &monitor));
    assert!(monitor.is_up());
}

/// A file whose last close blocks until the other end is dropped, and that.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let file = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other_end, _) = listener.accept().unwrap();
    set_socket_linger(&file, Some(Duration::from_secs(3600))).unwrap();
    file.set_nonblocking(true).unwrap();
    // More than the other end's buffer takes.
    while (&file).write(&[0; 1 << 16]).is_ok() {}
    (file, other_end)
}

/// Has a QEMU send such a file, and returns once nothing but the socket has it.
fn send_file(fake: &Fake, monitor: &Monitor, flags: SendFlags) -> TcpStream {
    let (file, other_end) = lingering();
    fake.machine().file = Some((file.into(), flags));
    monitor.send("stop", &json!({}), drop);
    let began = Instant::now();
    while !std::mem::take(&mut fake.machine().has_sent_file) {
        assert!(began.elapsed() < PATIENCE, "still waiting");
        std::thread::sleep(Duration::from_millis(1));
    }
    other_end
}

/// Does it on another thread, as it may not return.
#[track_caller]
fn returns(act: impl FnOnce() + Send + 'static) {
    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || {
        act();
        done.send(()).unwrap();
    });
    is_done.recv_timeout(PATIENCE).expect("it waits for the file to be closed");
}

#[test]
fn a_file_that_takes_long_to_close_does_not_hold_up_who_steps() {
    for flags in [SendFlags::empty(), SendFlags::OOB] {
        let fake = Fake::start("running");
        let (monitor, ear) = monitor(Some(Qmp::connect(&fake.path).unwrap()), || None);
        let _other_end = send_file(&fake, &monitor, flags);
        let stepped = Arc::clone(&monitor);
        returns(move || step_until(&stepped, || !stepped.is_up()));
        assert_eq!(lock(&ear.others).last().map(|(event, _)| event), Some(&MonitorEvent::Lost));
    }
}

#[test]
fn a_file_that_takes_long_to_close_does_not_hold_up_who_leaves() {
    let fake = Fake::start("running");
    let (monitor, ear) = monitor(Some(Qmp::connect(&fake.path).unwrap()), || None);
    let _other_end = send_file(&fake, &monitor, SendFlags::empty());
    let left = Arc::clone(&monitor);
    returns(move || left.unsubscribe(&subscriber(&ear)));
    assert!(!monitor.is_up());
}

#[test]
fn a_qemu_that_sends_files_again_and_again_leaves_threads_for_others() {
    let fake = Fake::start("running");
    let path = fake.path.clone();
    let find = move || Qmp::connect(&path).ok();
    let (monitor, _ear) = monitor(Some(Qmp::connect(&fake.path).unwrap()), find);
    let mut other_ends = Vec::new();
    for losses in 1..=MAX_CLOSING as u64 + 1 {
        step_until(&monitor, || monitor.is_up());
        other_ends.push(send_file(&fake, &monitor, SendFlags::empty()));
        step_until(&monitor, || monitor.counts().losses == losses);
    }
    assert_eq!(Arc::strong_count(&monitor.closing), 1 + MAX_CLOSING + 1);
    let now = Instant::now();
    lock(&monitor.state).again = Some(now);
    monitor.step();
    assert!(!monitor.is_up() && lock(&monitor.state).again.unwrap() >= now + CLOSING_PAUSE);
    drop(other_ends);
    step_until(&monitor, || monitor.is_up());
}

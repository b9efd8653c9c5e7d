// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Questions and pauses, with a fake QEMU.

use std::sync::{Mutex, mpsc};

use serde_json::json;

use super::*;
use crate::fake_qemu::{Fake, Fault, PATIENCE};
use crate::monitor::tests::threads;
use crate::qmp::QmpError;
use crate::qmp::tests::{GREETING, READY};
use crate::questions::{AskError, Questions};

type Job = Box<dyn FnOnce() + Send>;

/// Keeps jobs where there is a list for them; else each has a thread of its own.
fn keep(jobs: &Arc<Mutex<Option<Vec<Job>>>>) -> Arc<Run> {
    let kept = Arc::clone(jobs);
    Arc::new(move |job: Job| match &mut *kept.lock().unwrap() {
        Some(jobs) => {
            jobs.push(job);
            Ok(())
        }
        None => std::thread::Builder::new().spawn(job).map(drop),
    })
}

impl Fake {
    fn listen(&self) -> Listening {
        self.listen_with(PATIENCE, threads())
    }

    /// A pause ends after `silence`.
    fn listen_with(&self, silence: Duration, run: Arc<Run>) -> Listening {
        let path = self.path.clone();
        let find = move || Qmp::connect(&path).ok();
        let monitor = Monitor::new(self.path.clone(), None);
        Listening::start(monitor, find, |_| ListenerAction::Listen, silence, run)
    }
}

#[track_caller]
fn wait_until(is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "still waiting");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Asks as long as there is no connection yet.
fn retry<T>(ask: impl Fn() -> Result<T, AskError>) -> Result<T, AskError> {
    let began = Instant::now();
    loop {
        match ask() {
            Err(AskError::NoConnection) if began.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            answer => return answer,
        }
    }
}

/// A listener that a thread steps until it is over. Dropping it closes the listener.
#[derive(Debug)]
struct Listening {
    listener: Arc<Listener>,
    questions: Questions,
}

impl Listening {
    /// As [`Listener::new`].
    fn start(
        monitor: Arc<Monitor>,
        find: impl Fn() -> Option<Qmp> + Send + Sync + 'static,
        handle: impl FnMut(VmEvent<'_>) -> ListenerAction + Send + 'static,
        silence: Duration,
        run: Arc<Run>,
    ) -> Self {
        let listener = Listener::new(monitor, find, handle, silence, run, || {});
        let stepped = Arc::clone(&listener);
        std::thread::spawn(move || {
            while stepped.step().is_some() {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let questions = Questions::new(Arc::clone(&listener) as _);
        Self { listener, questions }
    }

    fn questions(&self) -> &Questions {
        &self.questions
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.listener.close();
    }
}

#[test]
fn the_last_holder_resumes_a_vm_that_ran() {
    let fake = Fake::start("running");
    let monitor = fake.listen();
    let questions = monitor.questions();
    let (first, was_running) = retry(|| questions.pause()).unwrap();
    assert!(was_running && first.check().unwrap());
    let (second, was_running) = questions.pause().unwrap();
    assert!(was_running);
    first.end().unwrap();
    assert_eq!(fake.machine().status, "paused");
    assert!(second.check().unwrap());
    drop(second);
    fake.wait("running");
    assert_eq!(fake.machine().commands, ["stop", "cont"]);
}

#[test]
fn a_vm_that_did_not_run_stays_as_it_is() {
    for status in ["paused", "suspended", "prelaunch"] {
        let fake = Fake::start(status);
        let monitor = fake.listen();
        let (pause, was_running) = retry(|| monitor.questions().pause()).unwrap();
        assert!(!was_running && !pause.check().unwrap());
        pause.end().unwrap();
        let machine = fake.machine();
        assert_eq!((machine.status, machine.commands.len()), (status, 0));
    }
}

#[test]
fn a_pause_that_is_not_asked_for_again_ends() {
    let fake = Fake::start("running");
    let monitor = fake.listen_with(Duration::from_secs(1), threads());
    let questions = monitor.questions();
    let (pause, _) = retry(|| questions.pause()).unwrap();
    // As if this process were stopped.
    fake.wait("running");
    assert!(matches!(pause.check(), Err(AskError::Resumed)));
    assert!(matches!(pause.end(), Err(AskError::Resumed)));
    // The connection is still of use.
    assert!(questions.pause().unwrap().1);
    fake.wait("running");
}

#[test]
fn a_pause_that_has_ended_unnoticed_does_not_end_well() {
    let fake = Fake::start("running");
    let monitor = fake.listen();
    let (pause, _) = retry(|| monitor.questions().pause()).unwrap();
    fake.machine().status = "running";
    assert!(matches!(pause.end(), Err(AskError::Resumed)));
}

#[test]
fn a_vm_that_another_client_resumes_is_no_longer_paused() {
    let fake = Fake::start("running");
    let monitor = fake.listen();
    let (pause, _) = retry(|| monitor.questions().pause()).unwrap();
    fake.machine().status = "running";
    assert!(matches!(pause.check(), Err(AskError::Resumed)));
    assert!(matches!(pause.end(), Err(AskError::Resumed)));
    // What became of it while it was stopped is not undone.
    let (pause, _) = monitor.questions().pause().unwrap();
    fake.machine().status = "internal-error";
    pause.end().unwrap();
    assert_eq!(fake.machine().status, "internal-error");
}

#[test]
fn a_vm_runs_again_after_each_fault() {
    for fault in [Fault::Close, Fault::CloseAfter, Fault::Silence, Fault::Garbage] {
        for command in ["query-status", "stop", "cont"] {
            let fake = Fake::start("running");
            let monitor = fake.listen();
            let (pause, _) = retry(|| monitor.questions().pause()).unwrap();
            fake.machine().fault = Some((command, fault));
            match command {
                "cont" => drop(pause.end()),
                "stop" => {
                    pause.end().unwrap();
                    let paused = monitor.questions().pause();
                    assert!(paused.is_err(), "{command} {fault:?}: {paused:?}");
                }
                _ => {
                    let checked = pause.check();
                    assert!(checked.is_err(), "{command} {fault:?}: {checked:?}");
                }
            }
            fake.wait("running");
        }
    }
}

#[test]
fn a_vm_that_qemu_has_not_resumed_in_time_runs_over_a_new_connection() {
    let fake = Fake::start("running");
    let listening = fake.listen();
    let (_pause, _) = retry(|| listening.questions().pause()).unwrap();
    let failed: Result<(), _> = listening.listener.pause(|holders| {
        holders.lost();
        Err(AskError::Silent)
    });
    assert!(matches!(failed, Err(AskError::Silent)));
    fake.wait("running");
    assert_eq!(fake.machine().commands, ["stop", "cont"]);
}

#[test]
fn a_target_that_is_removed_runs_again() {
    let fake = Fake::start("running");
    let monitor = fake.listen();
    let questions = monitor.questions().clone();
    let (pause, _) = retry(|| questions.pause()).unwrap();
    drop(monitor);
    fake.wait("running");
    let began = Instant::now();
    while !matches!(pause.check(), Err(AskError::NoConnection)) {
        assert!(began.elapsed() < PATIENCE);
    }
    assert!(matches!(questions.registers(0, 1), Err(AskError::NoConnection)));
}

#[test]
fn a_target_that_is_removed_after_a_lost_connection_runs_again() {
    let fake = Fake::start("running");
    let jobs: Arc<Mutex<Option<Vec<Job>>>> = Arc::default();
    let monitor = fake.listen_with(PATIENCE, keep(&jobs));
    let (pause, _) = retry(|| monitor.questions().pause()).unwrap();
    *jobs.lock().unwrap() = Some(Vec::new());
    fake.machine().fault = Some(("query-status", Fault::Close));
    assert!(pause.check().is_err());
    // One that ends the pause, one that closes the socket, and one that connects again.
    wait_until(|| jobs.lock().unwrap().as_ref().unwrap().len() >= 3);
    let all = jobs.lock().unwrap().replace(Vec::new()).unwrap();
    all.into_iter().for_each(|job| job());
    assert_eq!(fake.machine().commands, ["stop"]);
    // Before what is to be done over the new connection.
    drop(monitor);
    let rest = jobs.lock().unwrap().take().unwrap();
    rest.into_iter().for_each(|job| job());
    fake.wait("running");
    assert_eq!(fake.machine().commands, ["stop", "cont"]);
}

#[test]
fn a_client_that_ends_does_not_wait_for_its_vm_to_run() {
    let fake = Fake::start("running");
    let jobs: Arc<Mutex<Option<Vec<Job>>>> = Arc::default();
    let monitor = fake.listen_with(PATIENCE, keep(&jobs));
    let (pause, _) = retry(|| monitor.questions().pause()).unwrap();
    *jobs.lock().unwrap() = Some(Vec::new());
    drop(pause);
    assert_eq!(fake.machine().status, "paused", "it was waited for");
    let jobs = jobs.lock().unwrap().take().unwrap();
    jobs.into_iter().for_each(|job| job());
    fake.wait("running");
}

#[test]
fn a_refusal_to_resume_is_told() {
    let fake = Fake::start("running");
    let monitor = fake.listen();
    let (pause, _) = retry(|| monitor.questions().pause()).unwrap();
    fake.machine().fault = Some(("cont", Fault::Refuse));
    let error = pause.end().unwrap_err();
    assert!(error.to_string().contains("refuses cont"), "{error}");
}

#[test]
fn registers_that_make_no_sense_cost_no_connection() {
    let fake = Fake::start("running");
    let monitor = fake.listen();
    fake.machine().registers = "RAX=x".to_owned();
    let registers = retry(|| monitor.questions().registers(0, 1));
    assert!(matches!(registers, Err(AskError::Qmp(QmpError::Garbage { .. }))), "{registers:?}");
    // The same connection: a pause over it goes on.
    let (pause, _) = monitor.questions().pause().unwrap();
    assert!(monitor.questions().registers(0, 1).is_err());
    assert!(pause.check().unwrap());
    fake.machine().vcpus = json!([]);
    assert_eq!(monitor.questions().registers(0, 1).unwrap(), (vec![], false));
    fake.machine().vcpus = json!("many");
    assert!(monitor.questions().registers(0, 1).is_err());
    fake.wait("running");
}

#[test]
fn memory_that_is_plugged_in_before_the_first_question_or_after_it_is_noticed() {
    let size =
        |plugged| format!("{{\"return\":{{\"base-memory\":1,\"plugged-memory\":{plugged}}}}}\n");
    let (_directory, path, _qemu) =
        crate::qmp::tests::serve(vec![GREETING.into(), READY.into(), size(0), size(1)]);
    let qmp = Qmp::connect(&path).unwrap();
    let (told, events) = mpsc::channel();
    let handle = move |event: VmEvent<'_>| {
        let is_memory = matches!(event, VmEvent::Memory(_));
        told.send(is_memory).map_or(ListenerAction::Stop, |()| ListenerAction::Listen)
    };
    let monitor = Monitor::new(path, Some(qmp));
    let _listening = Listening::start(monitor, || None, handle, PATIENCE, threads());
    for _ in 0..2 {
        assert_eq!(events.recv_timeout(Duration::from_secs(60)), Ok(true));
    }
}

#[test]
fn a_reset_just_before_the_connection_is_lost_is_reported() {
    let (_directory, path, _qemu) = crate::qmp::tests::serve(vec![
        GREETING.into(),
        format!("{READY}{{\"event\":\"RESET\"}}\n"),
    ]);
    let jobs: Arc<Mutex<Option<Vec<Job>>>> = Arc::new(Mutex::new(Some(Vec::new())));
    let (resets, reset) = mpsc::channel();
    let handle = move |event: VmEvent<'_>| {
        if matches!(event, VmEvent::Reset) {
            resets.send(()).unwrap();
        }
        ListenerAction::Listen
    };
    let monitor = Monitor::new(path.clone(), Some(Qmp::connect(&path).unwrap()));
    let listening = Listening::start(Arc::clone(&monitor), || None, handle, PATIENCE, keep(&jobs));
    wait_until(|| monitor.counts().resets > 0);
    monitor.reconnect();
    wait_until(|| !monitor.is_up());
    // Also what the first job leaves to others.
    wait_until(|| {
        let due = jobs.lock().unwrap().replace(Vec::new()).unwrap();
        due.into_iter().for_each(|job| job());
        reset.try_recv().is_ok()
    });
    *jobs.lock().unwrap() = None;
    drop(listening);
}

#[test]
fn a_question_that_a_step_has_sent_has_its_limit_without_further_steps() {
    let fake = Fake::start("running");
    let path = fake.path.clone();
    let find = move || Qmp::connect(&path).ok();
    let monitor = Monitor::new(fake.path.clone(), None);
    let handle = |_: VmEvent<'_>| ListenerAction::Listen;
    let listener = Listener::new(Arc::clone(&monitor), find, handle, PATIENCE, threads(), || {});
    wait_until(|| {
        listener.step();
        monitor.is_up()
    });
    fake.machine().fault = Some(("query-memory-size-summary", Fault::Silence));
    listener.state().ask = Some(Instant::now());
    let until = listener.step().unwrap().until;
    assert!(until.is_some_and(|until| until > Instant::now()), "{until:?}");
    assert!(until.is_some_and(|until| until <= Instant::now() + crate::qmp::LIMIT), "{until:?}");
}

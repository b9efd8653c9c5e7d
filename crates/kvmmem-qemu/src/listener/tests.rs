// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Questions and pauses, with a fake QEMU.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, mpsc};

use serde_json::{Value, json};

use super::*;
use crate::monitor::tests::threads;
use crate::qmp::QmpError;
use crate::qmp::tests::GREETING;
use crate::questions::{AskError, Questions};

type Job = Box<dyn FnOnce() + Send>;

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// What goes wrong, at the next command of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Refuse,
    Close,
    /// It is carried out, and the connection ends before that is said.
    CloseAfter,
    Silence,
    Garbage,
}

#[derive(Debug)]
struct Machine {
    status: &'static str,
    fault: Option<(&'static str, Fault)>,
    registers: String,
    vcpus: Value,
    /// The commands that have come, without questions.
    commands: Vec<String>,
}

/// A fake QEMU; its threads end with the test's process.
struct Fake {
    machine: Arc<Mutex<Machine>>,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Fake {
    fn start(status: &'static str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let machine = Machine {
            status,
            fault: None,
            registers: String::new(),
            vcpus: json!([{ "cpu-index": 0 }]),
            commands: vec![],
        };
        let machine = Arc::new(Mutex::new(machine));
        let served = Arc::clone(&machine);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // One client at a time, as QEMU does it.
                let _ = serve(&served, &stream.unwrap());
            }
        });
        Self { machine, path, _directory: directory }
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }

    fn listen(&self) -> Listening {
        self.listen_with(PATIENCE, threads())
    }

    /// A pause ends after `silence`.
    fn listen_with(&self, silence: Duration, run: Arc<Run>) -> Listening {
        let path = self.path.clone();
        let find = move || Qmp::connect(&path).ok();
        let monitor = Monitor::new(self.path.clone(), None);
        Listening::start(monitor, find, |_, _| ListenerAction::Listen, silence, run)
    }

    #[track_caller]
    fn wait(&self, status: &str) {
        let began = Instant::now();
        while self.machine().status != status {
            assert!(began.elapsed() < PATIENCE, "still waiting for {status}: {:?}", self.machine());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn serve(machine: &Mutex<Machine>, stream: &UnixStream) -> std::io::Result<()> {
    let mut writer = stream;
    let mut send = |value: Value| writer.write_all(format!("{value}\n").as_bytes());
    send(json!({ "QMP": {} }))?;
    for line in BufReader::new(stream).lines() {
        let request: Value = serde_json::from_str(&line?).unwrap();
        let command = request["execute"].as_str().unwrap();
        let mut machine = machine.lock().unwrap();
        let fault = machine.fault.take_if(|(at, _)| *at == command).map(|(_, fault)| fault);
        match fault {
            Some(Fault::Refuse) => {
                send(json!({ "error": { "desc": "no" } }))?;
                continue;
            }
            Some(Fault::Close) => break,
            Some(Fault::Silence) => continue,
            Some(Fault::Garbage) => {
                send(json!([]))?;
                continue;
            }
            Some(Fault::CloseAfter) | None => {}
        }
        let answer = match command {
            "stop" | "cont" => {
                machine.status = if command == "stop" { "paused" } else { "running" };
                machine.commands.push(command.to_owned());
                json!({})
            }
            "query-status" => json!({ "status": machine.status }),
            "query-memory-size-summary" => json!({ "base-memory": 1 }),
            "query-cpus-fast" => machine.vcpus.clone(),
            "human-monitor-command" => json!(machine.registers),
            _ => json!({}),
        };
        drop(machine);
        if fault == Some(Fault::CloseAfter) {
            break;
        }
        match request.get("id") {
            Some(id) => send(json!({ "return": answer, "id": id }))?,
            None => send(json!({ "return": answer }))?,
        }
    }
    stream.shutdown(std::net::Shutdown::Both)
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
        tell: impl FnMut(&mut Qmp, VmEvent) -> ListenerAction + Send + 'static,
        silence: Duration,
        run: Arc<Run>,
    ) -> Self {
        let listener = Listener::new(monitor, find, tell, silence, run, || {});
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
fn a_client_that_ends_does_not_wait_for_its_vm_to_run() {
    let fake = Fake::start("running");
    let jobs: Arc<Mutex<Option<Vec<Job>>>> = Arc::default();
    let kept = Arc::clone(&jobs);
    let run = move |job: Job| match &mut *kept.lock().unwrap() {
        Some(jobs) => {
            jobs.push(job);
            Ok(())
        }
        None => std::thread::Builder::new().spawn(job).map(drop),
    };
    let monitor = fake.listen_with(PATIENCE, Arc::new(run));
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
    let (_directory, path, _qemu) = crate::qmp::tests::serve(vec![
        GREETING.into(),
        "{\"return\":{}}\n".into(),
        size(0),
        size(1),
    ]);
    let qmp = Qmp::connect(&path).unwrap();
    let (told, events) = mpsc::channel();
    let tell = move |_: &mut Qmp, event| {
        told.send(event).map_or(ListenerAction::Stop, |()| ListenerAction::Listen)
    };
    let monitor = Monitor::new(path, Some(qmp));
    let _listening = Listening::start(monitor, || None, tell, PATIENCE, threads());
    for _ in 0..2 {
        assert_eq!(events.recv_timeout(Duration::from_secs(60)), Ok(VmEvent::Memory));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registers and pauses of VMs that their VMMs have registered, and VMMs that answer badly or not
//! at all.

mod common;

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use kvmmem_client::ClientError;
use kvmmem_client::admin::Admin;
use kvmmem_client::vmm::{Registration, VcpuAnswer, VcpuQuestion, VcpuRegisters, Vcpus, VmmLink};
use kvmmem_proto::message::{Answer, Call, FromBroker, Refusal, Request};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};

use common::{TestBroker, ram, target, wait_for};

/// A VMM with so many vCPUs, each with its number as CR3.
struct Vmm {
    vcpus: u32,
    /// Who holds them stopped.
    holders: Mutex<Vec<u64>>,
}

impl Vmm {
    fn register(broker: &TestBroker, vcpus: u32) -> (VmmLink, Arc<Self>) {
        let link = VmmLink::connect(&broker.path, answering(), Some(ram())).unwrap();
        let vmm = Arc::new(Self { vcpus, holders: Mutex::default() });
        let handler: Weak<Self> = Arc::downgrade(&vmm);
        link.set_vcpus(handler);
        (link, vmm)
    }

    fn is_paused(&self) -> bool {
        !self.holders.lock().unwrap().is_empty()
    }
}

impl Vcpus for Vmm {
    fn answer(&self, question: VcpuQuestion) -> VcpuAnswer {
        let mut holders = self.holders.lock().unwrap();
        match question {
            VcpuQuestion::Registers { first, count } => {
                let all = (first..self.vcpus).map(|number| registers(number.into()));
                let more = self.vcpus > first + count;
                VcpuAnswer::Registers { vcpus: all.take(count as usize).collect(), more }
            }
            VcpuQuestion::Pause { holder, is_new } => {
                if is_new {
                    holders.push(holder);
                }
                if holders.contains(&holder) {
                    VcpuAnswer::Paused { was_running: true }
                } else {
                    VcpuAnswer::NotPaused
                }
            }
            VcpuQuestion::Resume { holder } => {
                holders.retain(|other| *other != holder);
                VcpuAnswer::Resumed
            }
        }
    }

    fn resume_all(&self) {
        self.holders.lock().unwrap().clear();
    }

    fn expire(&self) -> Option<Duration> {
        None
    }
}

fn registers(cr3: u64) -> VcpuRegisters {
    VcpuRegisters { cr3, lstar: Some(0xffff_ffff_8100_0000), ..VcpuRegisters::default() }
}

fn answering() -> Registration {
    Registration { vcpu_questions: true, ..target("tiger") }
}

#[track_caller]
fn message<T: std::fmt::Debug>(result: Result<T, ClientError>) -> String {
    match result {
        Err(ClientError::Refused { refusal: Refusal::Unsupported, message }) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_vmm_answers_for_its_vcpus() {
    let broker = TestBroker::start();
    let (_link, vmm) = Vmm::register(&broker, 35);
    let mut admin = broker.admin();
    let all = admin.registers("tiger").unwrap();
    assert_eq!(all, (0..35).map(registers).collect::<Vec<_>>());
    assert!(admin.pause("tiger").unwrap() && vmm.is_paused());
    assert!(admin.pause("tiger").unwrap());
    // Two clients hold it stopped, and one of them goes.
    let mut other = broker.admin();
    assert!(other.pause("tiger").unwrap());
    admin.resume("tiger").unwrap();
    assert!(vmm.is_paused());
    drop(other);
    wait_for("the VM to run", || !vmm.is_paused());
    // What the VMM has resumed by itself is no pause any more.
    admin.pause("tiger").unwrap();
    vmm.resume_all();
    let refused = admin.pause("tiger").unwrap_err();
    assert!(refused.to_string().contains("the VM runs again"), "{refused}");
}

/// What the audit log has about vCPUs: the event, and the reason where there is one.
fn about_vcpus(log: &[serde_json::Value]) -> Vec<(&str, Option<&str>)> {
    let events = log.iter().map(|line| (line["event"].as_str().unwrap(), line["reason"].as_str()));
    events.filter(|(event, _)| ["registers", "paused", "resumed"].contains(event)).collect()
}

#[test]
fn registers_are_in_the_audit_log_from_whichever_vcpu_on() {
    let broker = TestBroker::start();
    let log = broker.audit_log();
    let (_link, _vmm) = Vmm::register(&broker, 35);
    // Three pages.
    broker.admin().registers("tiger").unwrap();
    wait_for("one line", || about_vcpus(&log()) == [("registers", None)]);
    let mut operator = Liar::connect(&broker);
    for first in [16, 32, 32, 100] {
        operator.send(Call::Registers { target: "tiger".into(), first });
        let answer = operator.receive();
        assert!(matches!(answer, FromBroker::Answer { .. }), "{answer:?}");
    }
    // The second page follows the first; the others follow none.
    wait_for("four lines", || about_vcpus(&log()) == [("registers", None); 4]);
}

#[test]
fn a_resume_that_is_refused_ends_no_pause() {
    let broker = TestBroker::start();
    let log = broker.audit_log();
    let (link, vmm) = Vmm::register(&broker, 1);
    let _lion = broker.target("lion");
    let mut admin = broker.admin();
    admin.pause("tiger").unwrap();
    for name in ["nobody", "lion"] {
        admin.resume(name).unwrap_err();
        assert!(vmm.is_paused(), "{name}");
    }
    admin.resume("tiger").unwrap();
    assert!(!vmm.is_paused());
    // One that the VMM has ended by itself.
    admin.pause("tiger").unwrap();
    vmm.resume_all();
    admin.pause("tiger").unwrap_err();
    admin.resume("tiger").unwrap_err();
    // One of a VM that is gone does not keep the next one from being paused.
    admin.pause("tiger").unwrap();
    drop(link);
    wait_for("the VM to go", || broker.state.number("tiger").is_none());
    let (_link, vmm) = Vmm::register(&broker, 1);
    assert!(admin.pause("tiger").unwrap() && vmm.is_paused());
    let paused = ("paused", None);
    let [asked, runs, gone] =
        ["asked for", "the VM runs again", "the VM is gone"].map(|why| ("resumed", Some(why)));
    let all = [paused, asked, paused, runs, paused, gone, paused];
    wait_for("all lines", || about_vcpus(&log()) == all);
}

#[test]
fn the_end_of_the_broker_ends_its_pauses() {
    let broker = TestBroker::start();
    let (link, vmm) = Vmm::register(&broker, 1);
    let mut admin = broker.admin();
    admin.pause("tiger").unwrap();
    assert!(vmm.is_paused());
    let directory = broker.stop();
    wait_for("the VM to run", || !vmm.is_paused());
    let next = TestBroker::start_in(directory);
    wait_for("the VM to be registered", || link.is_connected());
    let mut admin = next.admin();
    assert_eq!(admin.registers("tiger").unwrap(), [registers(0)]);
    assert!(admin.pause("tiger").unwrap() && vmm.is_paused());
}

#[test]
fn a_vmm_that_does_not_know_the_question_is_not_asked() {
    let broker = TestBroker::start();
    let link = broker.target("tiger");
    for refused in
        [message(broker.admin().registers("tiger")), message(broker.admin().pause("tiger"))]
    {
        assert!(refused.contains("a VM of `kvmmem vm` answers"), "{refused}");
    }
    assert!(link.is_connected());
}

#[test]
fn a_vmm_that_is_not_ready_says_so() {
    let broker = TestBroker::start();
    let _link = VmmLink::connect(&broker.path, answering(), Some(ram())).unwrap();
    let refused = message(broker.admin().registers("tiger"));
    assert!(refused.contains("its VMM reports: the VM is starting"), "{refused}");
}

/// A VMM's connection that answers what a test wants.
struct Liar {
    socket: PacketSocket,
    buffer: PacketBuffer,
}

impl Liar {
    fn connect(broker: &TestBroker) -> Self {
        let socket = PacketSocket::connect(&broker.path, Duration::from_secs(60)).unwrap();
        socket.limit_receive(Some(Duration::from_secs(60))).unwrap();
        Self { socket, buffer: PacketBuffer::default() }
    }

    fn register(broker: &TestBroker) -> Self {
        let mut liar = Self::connect(broker);
        let ram = ram();
        let request = Request { id: 1, call: Call::Register(answering()) };
        liar.socket.send(&request, &[ram.as_fd()], Wait::Limited).unwrap();
        let answer = liar.receive();
        assert!(
            matches!(answer, FromBroker::Answer { answer: Answer::Registered { .. }, .. }),
            "{answer:?}"
        );
        liar
    }

    fn send(&self, call: Call) {
        self.socket.send(&Request { id: 1, call }, &[], Wait::Limited).unwrap();
    }

    fn receive(&mut self) -> FromBroker {
        self.socket.receive(&mut self.buffer).unwrap().expect("the broker closed").0
    }

    fn asked(&mut self) -> u64 {
        match self.receive() {
            FromBroker::AskVcpus { id, .. } => id,
            other => panic!("{other:?}"),
        }
    }

    fn answer(&self, id: u64, answer: VcpuAnswer) {
        self.send(Call::VcpuAnswer { id, answer });
    }
}

/// Asks on another thread.
fn asking<T: Send + 'static>(
    broker: &TestBroker,
    ask: impl FnOnce(&mut Admin) -> Result<T, ClientError> + Send + 'static,
) -> std::thread::JoinHandle<Result<T, ClientError>> {
    let mut admin = broker.admin();
    std::thread::spawn(move || ask(&mut admin))
}

#[test]
fn answers_that_make_no_sense_are_errors() {
    let broker = TestBroker::start();
    let mut liar = Liar::register(&broker);
    let long = "\x1b[2J".repeat(1000);
    for (answer, words) in [
        (VcpuAnswer::Paused { was_running: true }, "makes no sense"),
        (VcpuAnswer::Resumed, "makes no sense"),
        (VcpuAnswer::NotPaused, "the VM runs again"),
        (VcpuAnswer::Failed { message: long }, "its VMM reports: \\u{1b}[2J"),
    ] {
        let asked = asking(&broker, |admin| admin.registers("tiger"));
        let id = liar.asked();
        // Those that were not asked for are dropped.
        liar.answer(id + 1, VcpuAnswer::Registers { vcpus: vec![registers(1)], more: false });
        liar.answer(id, answer);
        let error = asked.join().unwrap().unwrap_err().to_string();
        assert!(error.contains(words) && error.len() < 4000, "{error}");
    }
    // More than were asked for: those are left out. No more, though there are said to be: that is
    // the end.
    let asked = asking(&broker, |admin| admin.registers("tiger"));
    let id = liar.asked();
    liar.answer(id, VcpuAnswer::Registers { vcpus: (0..40).map(registers).collect(), more: true });
    let id = liar.asked();
    liar.answer(id, VcpuAnswer::Registers { vcpus: vec![], more: true });
    assert_eq!(asked.join().unwrap().unwrap().len(), 16);
}

#[test]
fn a_vmm_that_does_not_answer_is_waited_for_a_limited_time() {
    let broker = TestBroker::start();
    let mut liar = Liar::register(&broker);
    let start = Instant::now();
    let asked = asking(&broker, |admin| admin.pause("tiger"));
    let id = liar.asked();
    let refused = message(asked.join().unwrap());
    assert!(refused.contains("has not answered for"), "{refused}");
    assert!(start.elapsed() < Duration::from_secs(60));
    // What comes too late is undone.
    liar.answer(id, VcpuAnswer::Paused { was_running: true });
    match liar.receive() {
        FromBroker::AskVcpus { question: VcpuQuestion::Resume { .. }, .. } => {}
        other => panic!("{other:?}"),
    }
    // Questions to a VMM that goes away end at once.
    let asked = asking(&broker, |admin| admin.registers("tiger"));
    liar.asked();
    drop(liar);
    let refused = message(asked.join().unwrap());
    assert!(refused.contains("the connection to its VMM is lost"), "{refused}");
}

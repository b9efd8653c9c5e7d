// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Threads that still have a VM when it ends: they close nothing of it.

use kvmmem_proto::map::Region;
use kvmmem_proto::message::VcpuAnswer;

use super::*;
use crate::reactor::tests::{hold, is_alive};
use crate::test_peer::ram;

impl Running {
    /// Ends a VMM's connection in such a way that closing its socket blocks until the stream that
    /// is returned is dropped.
    fn end(&self, vmm: Connection) -> TcpStream {
        // The broker needs it for the end, which has not begun when all has been sent.
        let service = self.server.service();
        let _tables = service.broker().tables();
        vmm.break_off()
    }

    /// Waits until so many connections are left; that of a VMM has done then what it does at its
    /// end, but for closing its socket.
    fn wait_for_connections(&self, left: usize) {
        let connections = || self.server.shared.wait_for_peers(Instant::now());
        wait_for("a connection to end", || connections() == left);
    }
}

#[test]
fn a_hook_that_has_not_ended_has_the_reactor_close_nothing_of_its_vm() {
    let running = Running::new(Limits::default());
    let service = running.server.service();
    let vmm = running.target(USER, "tiger").unwrap();
    let ram = Arc::downgrade(&service.broker().find("tiger").unwrap().ram().unwrap());
    let mut root = running.connect(ROOT);
    let directory = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::Unix(directory.path().join("tool.sock"));
    root.ask(Call::Hook { target: "tiger".into(), endpoint }, None).unwrap();

    // The hook's end waits for the reactor.
    let free = hold(service.reactor());
    let peer = running.end(vmm);
    running.wait_for_connections(1);
    assert_eq!(ram.strong_count(), 0, "the hook has its RAM open");
    drop(free);

    assert_eq!(service.broker().wait_for_hooks(Instant::now() + Duration::from_secs(60)), 0);
    let is_alive = is_alive(service.reactor());
    drop(peer);
    assert!(is_alive, "the reactor closes its socket");
}

#[test]
fn an_operator_s_pause_has_it_close_nothing_of_a_vm_that_has_ended() {
    let running = Running::new(Limits::default());
    let mut vmm = running.connect(USER);
    let regions = vec![Region { gpa: 0, len: 0x1000, offset: 0, file: 0 }];
    let tiger = VmIdentity { introspectable: true, ..identity("tiger") };
    let tiger =
        kvmmem_proto::message::Registration { vcpu_questions: true, ..tiger.registered(regions) };
    vmm.ask(Call::Register(tiger), Some(ram())).unwrap();
    let service = running.server.service();
    let ram = Arc::downgrade(&service.broker().find("tiger").unwrap().ram().unwrap());
    let mut root = running.connect(ROOT);
    root.send(Call::Pause { target: "tiger".into() }, None);
    let Some((FromBroker::AskVcpus { id, .. }, _)) = vmm.next() else { panic!("no question") };
    let answer = VcpuAnswer::Paused { was_running: true };
    vmm.send(Call::VcpuAnswer { id, answer }, None);
    let paused = root.next();
    let is_paused = matches!(
        &paused,
        Some((FromBroker::Answer { answer: Answer::Paused { was_running: true }, .. }, _))
    );
    assert!(is_paused, "{paused:?}");

    let peer = running.end(vmm);
    running.wait_for_connections(1);
    assert_eq!(ram.strong_count(), 0, "the pause has its RAM open");
    let resumed = root.ask(Call::Resume { target: "tiger".into() }, None);
    assert_eq!(resumed.map(drop).map_err(|(refusal, _)| refusal), Err(Refusal::Unknown));
    drop(root);
    running.wait_for_connections(0);
    drop(peer);
}

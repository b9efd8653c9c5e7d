// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who may do what, and for how long: calls of a VMM's connection, hooks, bound tokens, names.

mod common;

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};

use kvmmem_client::ClientError;
use kvmmem_client::admin::KvmiPolicy;
use kvmmem_client::vmm::{RedeemError, Registration, Rights, VmmLink};
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::message::{Answer, Call, FromBroker, Refusal, Request};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};

use common::{
    PATIENCE, TestBroker, Tool, introspector, may_open, ram, request, target, uuid, wait_for,
};
use kvmmem_abi::errno::KvmError;

/// A connection of a VMM that sends any call, and reads nothing that it is not asked to.
struct Vmm {
    socket: PacketSocket,
    buffer: PacketBuffer,
}

impl Vmm {
    fn register(broker: &TestBroker, registration: Registration, ram: Option<OwnedFd>) -> Self {
        let socket = PacketSocket::connect(&broker.path, PATIENCE).unwrap();
        socket.limit_receive(Some(PATIENCE)).unwrap();
        let mut vmm = Self { socket, buffer: PacketBuffer::default() };
        let answer = vmm.ask(Call::Register(registration), ram);
        assert!(
            matches!(answer, FromBroker::Answer { answer: Answer::Registered { .. }, .. }),
            "{answer:?}"
        );
        vmm
    }

    fn ask(&mut self, call: Call, file: Option<OwnedFd>) -> FromBroker {
        let files = file.as_ref().map(AsFd::as_fd);
        self.socket.send(&Request { id: 1, call }, files.as_slice(), Wait::Limited).unwrap();
        loop {
            let (message, _) =
                self.socket.receive(&mut self.buffer).unwrap().expect("the broker closed");
            if let FromBroker::Answer { .. } | FromBroker::Refused { .. } = message {
                return message;
            }
        }
    }
}

#[test]
fn a_vmm_hooks_nothing_and_lists_nobody() {
    let broker = TestBroker::start();
    let _bank = broker.target("bank");
    let mut lion = Vmm::register(&broker, introspector("lion", 7), None);
    let (target, endpoint) = ("bank".to_owned(), Endpoint::Vsock { cid: 7, port: 1234 });
    let calls = [
        Call::Hook { target: target.clone(), endpoint: endpoint.clone() },
        Call::Unhook { target, endpoint },
        Call::Targets { after: 0 },
    ];
    for call in calls {
        let words = format!("{call:?}");
        let answer = lion.ask(call, None);
        let is_denied = matches!(answer, FromBroker::Refused { refusal: Refusal::Denied, .. });
        assert!(is_denied, "{words}: {answer:?}");
    }
    assert_eq!(broker.state.hook_count(), 0);
}

#[test]
fn a_name_that_reads_as_a_uuid_is_refused_and_the_remedy_named() {
    let broker = TestBroker::start();
    let bank = broker.target("bank");
    let uuid = uuid("bank");
    let names = [
        uuid.to_string(),
        uuid.to_string().to_uppercase(),
        uuid.simple().to_string(),
        uuid.braced().to_string(),
        uuid.urn().to_string(),
    ];
    for name in names {
        let mut named = target("other");
        named.identity.name.clone_from(&name);
        let message = match VmmLink::connect(&broker.path, named, Some(ram())) {
            Err(ClientError::Refused { refusal: Refusal::Invalid, message }) => message,
            other => panic!("{name}: {other:?}"),
        };
        assert!(message.contains("UUID") && message.contains("--name"), "{message}");
        // What is said of a UUID is said of the VM that has it.
        broker.admin().policy(&uuid.to_string(), Some(KvmiPolicy::None)).unwrap();
        assert_eq!(broker.admin().policy("bank", None).unwrap(), KvmiPolicy::None);
    }
    drop(bank);
}

#[test]
fn a_token_that_cannot_be_pushed_stays_its_holder_s() {
    let broker = TestBroker::start();
    let deaf = Vmm::register(&broker, introspector("deaf", 7), None);
    let puma = broker.introspector("puma", 8);
    let uuid = uuid("deaf");
    // More packets than a socket queues.
    let targets: Vec<VmmLink> =
        (0..16).map(|number| broker.target(&format!("target-{number}"))).collect();
    let mut tokens = Vec::new();
    for number in 0..targets.len() {
        let vm = broker.state.number(&format!("target-{number}")).unwrap();
        tokens.extend((0..64).map(|_| broker.mint(vm, 7).unwrap()));
    }
    let holders: Vec<_> = broker.grants().iter().map(|grant| grant.holder).collect();
    assert!(
        !holders.is_empty() && holders.iter().all(|holder| *holder == Some(uuid)),
        "{holders:?}"
    );
    for token in &tokens {
        assert_eq!(puma.redeem(token).unwrap_err(), RedeemError::Unknown);
    }
    drop(deaf);
}

#[test]
fn a_hook_ends_with_the_vm_that_it_was_made_for() {
    let broker = TestBroker::start();
    let _bank = broker.target("bank");
    let endpoint = Endpoint::Vsock { cid: 7, port: 1234 };
    let refused = |result: Result<(), ClientError>| match result {
        Err(ClientError::Refused { refusal, message }) => (refusal, message),
        other => panic!("{other:?}"),
    };
    // Before the VM is registered, the context id belongs to no VM.
    let (refusal, message) = refused(broker.admin().hook("bank", &endpoint));
    assert!(refusal == Refusal::Unknown && message.contains("context id 7"), "{message}");
    for cid in [0, 1, 2] {
        let (refusal, message) =
            refused(broker.admin().hook("bank", &Endpoint::Vsock { cid, port: 1234 }));
        assert!(refusal == Refusal::Invalid && message.contains("unix:"), "{message}");
    }
    let lion = broker.introspector("lion", 7);
    broker.admin().hook("bank", &endpoint).unwrap();
    assert_eq!(broker.admin().targets().unwrap()[0].hooks.len(), 1);
    drop(lion);
    wait_for("the hook to end", || broker.admin().targets().unwrap()[0].hooks.is_empty());
    wait_for("the hook to end", || broker.state.hook_count() == 0);
    // The next VM with this context id has no hook that it was not given.
    let _puma = broker.introspector("puma", 7);
    assert!(broker.admin().targets().unwrap().iter().all(|vm| vm.hooks.is_empty()));
    broker.admin().hook("bank", &endpoint).unwrap();
}

#[test]
fn a_hook_makes_no_token_for_another_vm_with_its_context_id() {
    let broker = TestBroker::start();
    let _bank = broker.target("bank");
    let vm = broker.state.number("bank").unwrap();
    let mint = |tool| broker.service.mint_token(vm, Some(tool));
    let number = |name| broker.state.number(name).unwrap();
    let lion = broker.introspector("lion", 7);
    let tool = number("lion");
    lion.redeem(&mint(tool).unwrap()).unwrap();
    drop(lion);
    wait_for("the introspector to go", || broker.state.number("lion").is_none());
    let puma = broker.introspector("puma", 7);
    assert_eq!(mint(tool).err(), Some(KvmError::Perm));
    puma.redeem(&mint(number("puma")).unwrap()).unwrap();
}

#[test]
fn every_vm_that_registers_is_in_the_audit_log() {
    const COUNT: usize = 300;
    if !may_open(4 * COUNT) {
        return;
    }
    let broker = TestBroker::start();
    let log = broker.audit_log();
    // As after a start of the broker, when all VMMs connect at once.
    let vmms: Vec<Vmm> = (0..COUNT)
        .map(|number| {
            let mut named = target(&format!("{number}"));
            named.identity.name = format!("vm-{number}");
            Vmm::register(&broker, named, Some(ram()))
        })
        .collect();
    drop(vmms);
    let lines = |event: &str| {
        log()
            .iter()
            .filter(|line| line["event"] == event)
            .map(|line| line["name"].to_string())
            .collect::<BTreeSet<_>>()
    };
    wait_for("all to be registered", || lines("registered").len() == COUNT);
    wait_for("all to be gone", || lines("gone").len() == COUNT);
}

#[test]
fn a_tool_at_a_unix_socket_still_gets_what_it_is_hooked_to() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let tool = Tool::listen(&broker, "tool.sock");
    broker.admin().hook("tiger", &tool.endpoint).unwrap();
    assert_eq!(tool.accept().hello.name, "tiger");
    broker.grant(&request(Rights::ReadOnly));
}

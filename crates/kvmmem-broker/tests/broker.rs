// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs, tools and tokens through a running broker.

mod common;

use kvmmem_client::ClientError;
use kvmmem_client::vmm::{RedeemError, Rights, Token, VmIdentity, VmmLink};
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::message::{Call, Refusal};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};

use common::{
    PATIENCE, TestBroker, Tool, introspector, patient, ram, request, target, uuid, wait_for,
};
use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::request::Request;
use rustix::io::{pread, pwrite};

#[test]
fn vms_are_listed_as_long_as_they_are_registered() {
    let broker = TestBroker::start();
    let mut admin = broker.admin();
    assert_eq!(admin.targets().unwrap(), []);
    let links: Vec<VmmLink> = (0..40).map(|n| broker.target(&format!("vm-{n}"))).collect();
    let listed = admin.targets().unwrap();
    assert_eq!(listed.len(), 40);
    assert_eq!(
        (listed[7].identity.name.as_str(), listed[7].memory_bytes, listed[7].identity.vcpus),
        ("vm-7", 0x6000, 2)
    );
    assert_eq!(listed[7].pid, std::process::id());
    drop(links);
    let state = broker.state.clone();
    wait_for("the VMs to go", || (0..40).all(|n| state.number(&format!("vm-{n}")).is_none()));
    assert_eq!(admin.targets().unwrap(), []);
}

#[test]
fn a_second_vm_of_the_same_name_uuid_or_cid_is_refused_by_name() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let _lion = broker.introspector("lion", 7);
    let refused = |registration, ram| match VmmLink::connect(&broker.path, registration, ram) {
        Err(ClientError::Refused { refusal: Refusal::Exists, message }) => message,
        other => panic!("{other:?}"),
    };
    assert!(refused(target("tiger"), Some(ram())).contains("\"tiger\""));
    let mut twin = target("twin");
    twin.identity.uuid = uuid("tiger");
    assert!(refused(twin.clone(), Some(ram())).contains(&twin.identity.uuid.to_string()));
    assert!(refused(introspector("puma", 7), None).contains("context id 7"));
}

#[test]
fn one_vm_may_be_a_target_and_an_introspector_by_two_names() {
    let broker = TestBroker::start();
    let uuid = uuid("tiger");
    let looks =
        |name, cid| VmIdentity { uuid, ..introspector(name, cid).identity }.registered(vec![]);
    let _looks = VmmLink::connect(&broker.path, looks("tiger-looks", 7), None).unwrap();
    let _tiger = broker.target("tiger");
    // By its UUID it is the target: an introspector cannot be granted.
    assert_eq!(broker.state.number(&uuid.to_string()), broker.state.number("tiger"));
    let third = VmmLink::connect(&broker.path, looks("puma", 8), None);
    assert!(
        matches!(third, Err(ClientError::Refused { refusal: Refusal::Exists, .. })),
        "{third:?}"
    );
}

#[test]
fn a_tool_reads_and_writes_a_hooked_target() {
    let broker = TestBroker::start();
    let memory = ram();
    pwrite(&memory, b"stripes", 0x10_1000).unwrap();
    let link =
        VmmLink::connect(&broker.path, target("tiger"), Some(memory.try_clone().unwrap())).unwrap();
    let tool = Tool::listen(&broker, "tool.sock");
    let mut admin = broker.admin();
    admin.hook("tiger", &tool.endpoint).unwrap();
    let mut session = tool.accept();
    assert_eq!(session.hello.name, "tiger");
    assert_eq!(session.hello.uuid, uuid("tiger").into_bytes());
    assert_eq!(session.ask(Request::ReadPhysical { gpa: 0x10_1000, size: 7 }).unwrap(), b"stripes");
    session.ask(Request::WritePhysical { gpa: 0x3ffe, data: b"!?" }).unwrap();
    let mut bytes = [0; 2];
    pread(&memory, &mut bytes, 0x3ffe).unwrap();
    assert_eq!(&bytes, b"!?");
    assert_eq!(session.ask(Request::GetMaxGfn).unwrap(), 0x102u64.to_le_bytes());
    let slot = |gfn: u64, pages: u64| [gfn.to_le_bytes(), pages.to_le_bytes()].concat();
    assert_eq!(session.ask(Request::QueryPhysical { gfn: 3 }).unwrap(), slot(0, 4));
    assert_eq!(session.ask(Request::QueryPhysical { gfn: 0x100 }).unwrap(), slot(0x100, 2));
    for gfn in [4, 0xff, 0x102, u64::MAX, 1 << 52] {
        assert_eq!(session.ask(Request::QueryPhysical { gfn }), Err(KvmError::Inval), "{gfn:#x}");
    }
    for gpa in [0x4000, 0x10_2000, !0xfff] {
        assert_eq!(
            session.ask(Request::ReadPhysical { gpa, size: 8 }),
            Err(KvmError::Inval),
            "{gpa:#x}"
        );
        assert_eq!(
            session.ask(Request::WritePhysical { gpa, data: b"x" }),
            Err(KvmError::Inval),
            "{gpa:#x}"
        );
    }
    assert!(admin.targets().unwrap()[0].hooks[0].connected);

    // The tool comes back: the broker connects again.
    drop(session);
    let mut session = tool.accept();
    assert!(session.ask(Request::GetVersion).is_ok());

    // The target goes: the tool is cut off, and no hook connects any more.
    drop(link);
    assert!(session.is_closed());
    wait_for("the hook to end", || broker.state.hook_count() == 0);
}

#[test]
fn hooks_are_undone_and_doubled_ones_refused() {
    let broker = TestBroker::start();
    let _link = broker.target("tiger");
    let tool = Tool::listen(&broker, "tool.sock");
    let mut admin = broker.admin();
    let refused = |result: Result<(), ClientError>| match result {
        Err(ClientError::Refused { refusal, .. }) => refusal,
        other => panic!("{other:?}"),
    };
    let uuid = uuid("tiger").to_string();
    admin.hook(&uuid, &tool.endpoint).unwrap();
    assert_eq!(refused(admin.hook("tiger", &tool.endpoint)), Refusal::Exists);
    assert_eq!(refused(admin.hook("lion", &tool.endpoint)), Refusal::Unknown);
    let mut session = tool.accept();
    admin.unhook("tiger", &tool.endpoint).unwrap();
    assert!(session.is_closed());
    assert_eq!(refused(admin.unhook("tiger", &tool.endpoint)), Refusal::Unknown);
    for n in 0..8 {
        admin.hook("tiger", &Endpoint::Unix(format!("/nowhere/{n}").into())).unwrap();
    }
    assert_eq!(refused(admin.hook("tiger", &tool.endpoint)), Refusal::Limit);
    let _blind = broker.introspector("blind", 9);
    assert_eq!(refused(admin.hook("blind", &tool.endpoint)), Refusal::Denied);
}

/// As it is on the wire: a VMM whose guest has broken into it learns no more of its targets.
#[test]
fn a_vmm_is_told_the_name_and_the_uuid_of_a_target_alone() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let granted = broker.grant(&request(Rights::ReadOnly));
    let lion = PacketSocket::connect(&broker.path, PATIENCE).unwrap();
    lion.limit_receive(Some(PATIENCE)).unwrap();
    let mut buffer = PacketBuffer::default();
    let register = Call::Register(introspector("lion", 7));
    for (id, call) in [(1, register), (2, Call::Redeem { token: granted.token })] {
        lion.send(&kvmmem_proto::message::Request { id, call }, &[], Wait::Limited).unwrap();
    }
    let pushed = std::iter::from_fn(|| {
        let received = lion.receive::<serde_json::Value>(&mut buffer).unwrap();
        received.map(|(message, _)| message["target"].clone())
    });
    let pushed = pushed.into_iter().find(|target| !target.is_null()).unwrap();
    assert_eq!(
        (&pushed["name"], &pushed["uuid"]),
        (&"tiger".into(), &uuid("tiger").to_string().into())
    );
    let serde_json::Value::Object(identity) =
        serde_json::to_value(target("tiger").identity).unwrap()
    else {
        panic!("no object")
    };
    let told = identity.keys().filter(|key| pushed.get(key).is_some());
    assert_eq!(told.collect::<Vec<_>>(), ["name", "uuid"]);
}

#[test]
fn a_bearer_token_is_redeemed_once_by_an_introspector() {
    let broker = TestBroker::start();
    let memory = ram();
    pwrite(&memory, b"stripes", 0x10_1000).unwrap();
    let tiger = VmmLink::connect(&broker.path, target("tiger"), Some(memory)).unwrap();
    let lion = broker.introspector("lion", 7);
    let tool = Tool::listen(&broker, "tool.sock");
    broker.admin().hook("tiger", &tool.endpoint).unwrap();
    let mut session = tool.accept();

    let token = session.token().unwrap();
    assert_eq!(tiger.redeem(&token).unwrap_err(), RedeemError::Denied);
    let found = lion.redeem(&token).unwrap().target;
    assert_eq!(found.name(), "tiger");
    assert_eq!((found.resolve(0x3fff), found.resolve(0x4000)), (Some((0, 0x3fff)), None));
    let mut bytes = [0; 7];
    let (file, offset) = found.resolve(0x10_1000).unwrap();
    pread(found.file(file).unwrap(), &mut bytes, offset).unwrap();
    assert_eq!(&bytes, b"stripes");
    assert_eq!(lion.redeem(&token).unwrap_err(), RedeemError::Unknown);
    assert_eq!(lion.redeem(&Token::new([1, 2, 3, 4])).unwrap_err(), RedeemError::Unknown);

    // The same target again, now known.
    let again = lion.redeem(&session.token().unwrap()).unwrap().target;
    assert_eq!(again.id(), found.id());
}

#[test]
fn tokens_expire_and_run_out() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let lion = broker.introspector("lion", 7);
    let tool = Tool::listen(&broker, "tool.sock");
    broker.admin().hook("tiger", &tool.endpoint).unwrap();
    let mut session = tool.accept();
    let tokens: Vec<Token> = (0..64).map(|_| session.token().unwrap()).collect();
    assert_eq!(session.token().err(), Some(KvmError::Again));
    lion.redeem(&tokens[0]).unwrap();
    session.token().unwrap();
    broker.state.pass_time(patient().kvmi_lifetime);
    assert_eq!(lion.redeem(&tokens[1]).unwrap_err(), RedeemError::Unknown);
    for _ in 0..64 {
        session.token().unwrap();
    }
}

#[test]
fn a_token_for_a_vsock_tool_is_pushed_to_its_vm_and_good_there_only() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let lion = broker.introspector("lion", 7);
    let puma = broker.introspector("puma", 8);
    let vm = broker.state.number("tiger").unwrap();
    let mint = || broker.mint(vm, 7).unwrap();

    // Pushed before `mint` returns, but perhaps not read yet: then the broker is asked, and points
    // back to the push.
    for _ in 0..200 {
        let token = mint();
        assert_eq!(puma.redeem(&token).unwrap_err(), RedeemError::Unknown);
        assert_eq!(lion.redeem(&token).unwrap().target.name(), "tiger");
        assert_eq!(lion.redeem(&token).unwrap_err(), RedeemError::Unknown);
    }

    // In a VM that is no introspector, any bearer may use the token; a VM that is gone gets
    // none.
    assert_eq!(broker.mint(vm, 99).err(), Some(KvmError::Perm));
    let mut plain = introspector("plain", 99);
    plain.identity.introspector = false;
    let _plain = VmmLink::connect(&broker.path, plain, None).unwrap();
    let token = broker.mint(vm, 99).unwrap();
    puma.redeem(&token).unwrap();
}

#[test]
fn a_pushed_token_is_claimed_once_by_many_threads() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let lion = broker.introspector("lion", 7);
    let vm = broker.state.number("tiger").unwrap();
    for _ in 0..50 {
        let token = broker.mint(vm, 7).unwrap();
        let won = std::thread::scope(|scope| {
            let tries: Vec<_> =
                (0..4).map(|_| scope.spawn(|| lion.redeem(&token).is_ok())).collect();
            tries.into_iter().map(|each| each.join().unwrap()).filter(|won| *won).count()
        });
        assert_eq!(won, 1);
    }
}

#[test]
fn a_vm_gets_no_token_for_itself() {
    let broker = TestBroker::start();
    let mut both = target("both");
    both.identity.cid = Some(7);
    both.identity.introspector = true;
    let link = VmmLink::connect(&broker.path, both, Some(ram())).unwrap();
    let vm = broker.state.number("both").unwrap();
    let minted = broker.mint(vm, 7);
    assert_eq!(minted.err(), Some(KvmError::Perm));
    let bearer = broker.mint_bearer(vm).unwrap();
    assert_eq!(link.redeem(&bearer).unwrap_err(), RedeemError::Denied);
}

#[test]
fn the_end_of_a_target_voids_its_tokens_and_keeps_what_is_mapped() {
    let broker = TestBroker::start();
    let tiger = broker.target("tiger");
    let lion = broker.introspector("lion", 7);
    let vm = broker.state.number("tiger").unwrap();
    let mint = || broker.mint(vm, 7);
    let held = lion.redeem(&mint().unwrap()).unwrap().target;
    let late = mint().unwrap();
    let bearer = broker.mint_bearer(vm).unwrap();
    drop(tiger);
    wait_for("the target to go", || broker.state.number("tiger").is_none());
    assert_eq!(mint().err(), Some(KvmError::OpNotSupp));
    wait_for("the news to come", || lion.redeem(&late).is_err());
    assert_eq!(lion.redeem(&bearer).unwrap_err(), RedeemError::Unknown);
    pread(held.file(0).unwrap(), &mut [0; 8], 0).unwrap();
    // The name is free again.
    let _tiger = broker.target("tiger");
}

#[test]
fn the_end_of_an_introspector_voids_its_tokens() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let lion = broker.introspector("lion", 7);
    let vm = broker.state.number("tiger").unwrap();
    let tokens: Vec<Token> = (0..64).map(|_| broker.mint(vm, 7).unwrap()).collect();
    assert_eq!(broker.mint(vm, 7).err(), Some(KvmError::Again));
    drop(lion);
    wait_for("the introspector to go", || broker.state.number("lion").is_none());
    let lion = broker.introspector("lion", 7);
    assert_eq!(lion.redeem(&tokens[0]).unwrap_err(), RedeemError::Unknown);
    // Its tokens no longer count.
    let token = broker.mint(vm, 7).unwrap();
    lion.redeem(&token).unwrap();
}

#[test]
fn vms_register_again_with_a_new_broker() {
    let broker = TestBroker::start();
    let tiger = broker.target("tiger");
    let lion = broker.introspector("lion", 7);
    let directory = broker.stop();
    wait_for("the links to notice", || !tiger.is_connected() && !lion.is_connected());
    assert_eq!(lion.redeem(&Token::new([1, 2, 3, 4])).unwrap_err(), RedeemError::Unavailable);
    let broker = TestBroker::start_in(directory);
    wait_for("the links to be back", || tiger.is_connected() && lion.is_connected());
    let vm = broker.state.number("tiger").unwrap();
    let token = broker.mint(vm, 7).unwrap();
    assert_eq!(lion.redeem(&token).unwrap().target.name(), "tiger");
}

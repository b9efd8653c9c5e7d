// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every call, sent on every kind of connection.

use std::sync::Arc;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::message::{
    Answer, Call, Caller, Change, Cursor, IntrospectorRequest, NewGrant, OnSilence, Refusal,
    Unusable, VcpuAnswer, ViewCounters, VmIdentity, Which,
};

use super::Role;
use crate::service::Service;
use crate::test_peer::{Connection, USER, grant_request, identity};

const ROLES: [Role; 4] = [Role::Administrator, Role::Operator, Role::Viewer, Role::Vmm];

/// One of each call, with who may send it: administrator, operator, viewer, VMM. The arguments are
/// such that a call that may be sent is refused for another reason than the sender, if it is
/// refused.
fn calls() -> Vec<(Call, &'static str)> {
    let token = || Token::new([1, 2, 3, 4]);
    let none = || "nowhere".to_owned();
    let counters = ViewCounters::default();
    let unix = Endpoint::Unix("/nowhere/at/all".into());
    let vsock = Endpoint::Vsock { cid: 99, port: 1 };
    let grant = grant_request("nowhere");
    let caller = Caller { pid: 1, uid: 1, comm: none() };
    let nameless = VmIdentity { name: String::new(), ..identity("nobody") }.registered(vec![]);
    vec![
        (Call::Register(nameless), "ao--"),
        (Call::Redeem { token: token() }, "---v"),
        (Call::Used { grant: 0 }, "---v"),
        (Call::Attach { token: token(), caller, read_only: true, reaching: vec![] }, "aohv"),
        (Call::OpenCopies { view: 0 }, "--h-"),
        (Call::Detached { view: 0, counters }, "--hv"),
        (Call::Counters { view: 0, counters }, "--hv"),
        (Call::RevokedDone { grant: 0 }, "--hv"),
        (Call::RamChanged { regions: vec![], change: Change::Reset }, "---v"),
        (Call::Grant(grant), "ao--"),
        (Call::Grants { after: Cursor::default() }, "ao--"),
        (Call::Revoke { grant: 0 }, "ao--"),
        (Call::Policy { target: none(), set: None }, "ao--"),
        (Call::Targets { after: 0 }, "ao--"),
        (Call::AddTarget { which: Which::Pid(0), name: None }, "a---"),
        (Call::RemoveTarget { target: none() }, "a---"),
        (
            Call::AddIntrospector(IntrospectorRequest {
                which: Which::Pid(0),
                cid: None,
                name: None,
                on_silence: OnSilence::Report,
                trusted: false,
            }),
            "a---",
        ),
        (Call::RemoveIntrospector { name: none() }, "a---"),
        (Call::FreeSlots { introspector: none() }, "ao--"),
        (Call::Hook { target: none(), endpoint: unix.clone() }, "a---"),
        (Call::Hook { target: none(), endpoint: vsock.clone() }, "ao--"),
        (Call::Unhook { target: none(), endpoint: unix }, "a---"),
        (Call::Unhook { target: none(), endpoint: vsock }, "ao--"),
        (Call::Registers { target: none(), first: 0 }, "ao--"),
        (Call::Pause { target: none() }, "ao--"),
        (Call::Resume { target: none() }, "ao--"),
        (Call::VcpuAnswer { id: 1, answer: VcpuAnswer::Resumed }, "---v"),
        (Call::Unreceived { target: 0, introduction: 0, unusable: Unusable::View(0) }, "--hv"),
        (Call::Continued { generation: 1 }, "---v"),
    ]
}

/// A number for each kind of call. A call that is added does not compile without its line here, and
/// without its line above `every_call_is_tried` fails.
fn number(call: &Call) -> usize {
    match call {
        Call::Register(_) => 0,
        Call::Redeem { .. } => 1,
        Call::Used { .. } => 2,
        Call::Attach { .. } => 3,
        Call::OpenCopies { .. } => 4,
        Call::Detached { .. } => 5,
        Call::Counters { .. } => 6,
        Call::RevokedDone { .. } => 7,
        Call::RamChanged { .. } => 8,
        Call::Grant(_) => 9,
        Call::Grants { .. } => 10,
        Call::Revoke { .. } => 11,
        Call::Policy { .. } => 12,
        Call::Targets { .. } => 13,
        Call::AddTarget { .. } => 14,
        Call::RemoveTarget { .. } => 15,
        Call::AddIntrospector { .. } => 16,
        Call::RemoveIntrospector { .. } => 17,
        Call::FreeSlots { .. } => 18,
        Call::Hook { .. } => 19,
        Call::Unhook { .. } => 20,
        Call::Registers { .. } => 21,
        Call::Pause { .. } => 22,
        Call::Resume { .. } => 23,
        Call::VcpuAnswer { .. } => 24,
        Call::Unreceived { .. } => 25,
        Call::Continued { .. } => COUNT - 1,
    }
}

const COUNT: usize = 27;

/// A connection that is what `role` says.
fn connection(broker: &Arc<Service>, role: Role) -> Connection {
    let mut connection =
        Connection::new(broker, if role == Role::Administrator { 0 } else { USER });
    match role {
        Role::Administrator | Role::Operator => {}
        Role::Viewer => {
            let granted = connection.ask(Call::Grant(grant_request("tiger")), None);
            let Ok(Answer::Granted(NewGrant { token, .. })) = granted else {
                panic!("{granted:?}")
            };
            let caller = Caller { pid: 1, uid: 1, comm: "tool".into() };
            let attached = connection
                .ask(Call::Attach { token, caller, read_only: true, reaching: vec![] }, None);
            assert!(matches!(attached, Ok(Answer::HostAttached { .. })), "{attached:?}");
        }
        Role::Vmm => {
            let lion = VmIdentity { cid: Some(7), introspector: true, ..identity("lion") };
            connection.ask(Call::Register(lion.registered(vec![])), None).unwrap();
        }
    }
    connection
}

#[test]
fn every_call_is_tried() {
    let mut numbers: Vec<usize> = calls().iter().map(|(call, _)| number(call)).collect();
    numbers.dedup();
    assert_eq!(numbers, (0..COUNT).collect::<Vec<_>>());
}

#[test]
fn every_call_is_denied_to_all_roles_but_its_own() {
    let broker = Arc::<Service>::default();
    let mut tiger = Connection::new(&broker, USER);
    tiger.register_target("tiger").unwrap();
    for (role, letter) in ROLES.into_iter().zip(['a', 'o', 'h', 'v']) {
        let mut connection = connection(&broker, role);
        for (call, allowed) in calls() {
            let (words, allowed) = (format!("{role:?}: {call:?}"), allowed.contains(letter));
            assert_eq!(role.check(&call).is_ok(), allowed, "{words}");
            if call.is_one_way() {
                connection.send(call, None);
                continue;
            }
            match connection.ask(call, None) {
                Err((Refusal::Denied, message)) => {
                    assert!(!allowed, "{words}: {message}");
                    assert!(message.contains("may"), "{words}: {message}");
                }
                answer => assert!(allowed, "{words}: {answer:?}"),
            }
        }
        // None of it changed what the connection is.
        assert!(matches!(
            (role, connection.ask(Call::Targets { after: 0 }, None)),
            (Role::Administrator | Role::Operator, Ok(_))
                | (Role::Viewer | Role::Vmm, Err((Refusal::Denied, _)))
        ));
    }
}

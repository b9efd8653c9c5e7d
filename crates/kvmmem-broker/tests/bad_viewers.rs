// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Peers that break the rules of grants and views: each is refused, waited for in vain or cut off,
//! and no other peer notices.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvmmem_client::ClientError;
use kvmmem_client::admin::{GrantRequest, GrantState, Span};
use kvmmem_client::vmm::{
    Caller, Change, RedeemError, Region, Registration, Rights, Token, ViewCounters, VmmLink,
};
use kvmmem_proto::message::{Answer, Call, FromBroker, Refusal, Request};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};

use common::{TestBroker, caller, introspector, memfd, ram, regions, request, target, wait_for};
use rustix::fs::SealFlags;

/// A peer that says what it likes.
struct Peer {
    socket: PacketSocket,
    buffer: PacketBuffer,
}

impl Peer {
    fn connect(broker: &TestBroker) -> Self {
        let socket = PacketSocket::connect(&broker.path, Duration::from_secs(60)).unwrap();
        socket.limit_receive(Some(Duration::from_secs(60))).unwrap();
        Self { socket, buffer: PacketBuffer::default() }
    }

    fn register(broker: &TestBroker, registration: Registration, ram: Option<OwnedFd>) -> Self {
        let mut peer = Self::connect(broker);
        let answer = peer.ask_with(Call::Register(registration), ram);
        assert!(
            matches!(answer, FromBroker::Answer { answer: Answer::Registered { .. }, .. }),
            "{answer:?}"
        );
        peer
    }

    fn tell(&self, call: Call) {
        self.socket.send(&Request { id: 0, call }, &[], Wait::Limited).unwrap();
    }

    fn ask(&mut self, call: Call) -> FromBroker {
        self.ask_with(call, None)
    }

    /// The answer; what is pushed before it is left out.
    fn ask_with(&mut self, call: Call, fd: Option<OwnedFd>) -> FromBroker {
        self.socket
            .send(&Request { id: 5, call }, fd.as_ref().map(AsFd::as_fd).as_slice(), Wait::Limited)
            .unwrap();
        loop {
            if let answer @ (FromBroker::Answer { .. } | FromBroker::Refused { .. }) = self.next() {
                return answer;
            }
        }
    }

    fn next(&mut self) -> FromBroker {
        self.socket.receive(&mut self.buffer).unwrap().expect("the broker closed").0
    }

    fn refusal(&mut self, call: Call) -> Refusal {
        match self.ask(call) {
            FromBroker::Refused { refusal, .. } => refusal,
            other => panic!("{other:?}"),
        }
    }

    fn attach(&mut self, token: &Token) -> FromBroker {
        self.ask(attach(token))
    }
}

fn attach(token: &Token) -> Call {
    Call::Attach { token: token.clone(), caller: caller(), read_only: true, reaching: vec![] }
}

const COUNTERS: ViewCounters = ViewCounters { seeks: u64::MAX, refused_writes: u64::MAX };

#[test]
fn a_view_is_its_owner_s_alone() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    // It confirms nothing.
    let lion = broker.introspector("lion", 7);
    let granted = broker.grant(&request(Rights::ReadOnly));
    let view = lion.attach(&granted.token, &caller(), false).unwrap().view;
    let mut puma = Peer::register(&broker, introspector("puma", 8), None);
    let mut nobody = Peer::connect(&broker);
    let meddle = |peer: &mut Peer| {
        for view in [0, view, view + 1, u64::MAX] {
            peer.tell(Call::Counters { view, counters: COUNTERS });
            peer.tell(Call::Detached { view, counters: COUNTERS });
            peer.tell(Call::Detached { view, counters: COUNTERS });
        }
        for grant in [0, granted.grant, u64::MAX] {
            peer.tell(Call::RevokedDone { grant });
        }
        peer.tell(Call::Used { grant: granted.grant });
        // All of that was read when this is answered.
        peer.ask(Call::Targets { after: 0 });
    };
    meddle(&mut puma);
    meddle(&mut nobody);
    let listed = &broker.grants()[0];
    assert_eq!((listed.views.len(), listed.views[0].counters), (1, ViewCounters::default()));
    assert!(lion.current(view).is_some());
    // Nor does anybody confirm in its place.
    let revoked = std::thread::scope(|scope| {
        let revoking = scope.spawn(|| broker.revoke(granted.grant));
        wait_for("the grant to be revoked", || broker.grants()[0].state == GrantState::Revoked);
        meddle(&mut puma);
        meddle(&mut nobody);
        drop(lion);
        revoking.join().unwrap()
    });
    assert_eq!((revoked.views, revoked.unconfirmed), (1, 1));
}

#[test]
fn a_vmm_is_no_operator_and_a_target_no_viewer() {
    let broker = TestBroker::start();
    let granted = {
        let _tiger = broker.target("tiger");
        broker.grant(&request(Rights::ReadOnly))
    };
    wait_for("the target to go", || broker.state.number("tiger").is_none());
    let _tiger = broker.target("tiger");
    let mut lion = Peer::register(&broker, introspector("lion", 7), None);
    let calls = || {
        [
            Call::Grant(request(Rights::ReadWrite)),
            Call::Grants { after: Default::default() },
            Call::Revoke { grant: granted.grant },
            Call::Policy { target: "tiger".into(), set: None },
        ]
    };
    for call in calls() {
        assert_eq!(lion.refusal(call), Refusal::Denied);
    }
    // The grant went with its target; its number is not the new one's.
    assert_eq!(lion.refusal(attach(&granted.token)), Refusal::Unknown);
    let mut blind = Peer::register(&broker, target("blind"), Some(ram()));
    let granted = broker.grant(&request(Rights::ReadOnly));
    assert_eq!(blind.refusal(attach(&granted.token)), Refusal::Denied);

    let mut process = Peer::connect(&broker);
    let answer = process.attach(&granted.token);
    assert!(
        matches!(answer, FromBroker::Answer { answer: Answer::HostAttached { .. }, .. }),
        "{answer:?}"
    );
    assert_eq!(process.refusal(Call::Register(introspector("puma", 9))), Refusal::Denied);
}

#[test]
fn a_vmm_that_never_confirms_holds_up_nobody_else() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let granted = broker.grant(&GrantRequest { uses: 64, ..request(Rights::ReadOnly) });
    let mut silent = Peer::register(&broker, introspector("silent", 9), None);
    for _ in 0..8 {
        silent.attach(&granted.token);
    }
    std::thread::scope(|scope| {
        let revoking = scope.spawn(|| broker.revoke(granted.grant));
        wait_for("the grant to be revoked", || broker.grants()[0].state == GrantState::Revoked);
        let (lion, views) = broker.viewer("lion", 7, Duration::ZERO);
        for _ in 0..20 {
            let other = broker.grant(&request(Rights::ReadOnly));
            views.open(&lion, &other.token).unwrap();
            assert_eq!(broker.revoke(other.grant).unconfirmed, 0);
        }
        assert!(!revoking.is_finished());
        assert!(matches!(silent.next(), FromBroker::Revoke { grant } if grant == granted.grant));
        silent.tell(Call::RevokedDone { grant: granted.grant });
        let revoked = revoking.join().unwrap();
        assert_eq!((revoked.views, revoked.unconfirmed), (8, 0));
    });
    assert_eq!(broker.state.grant_count().1, 0);
}

#[test]
fn a_viewer_that_does_not_read_is_cut_off() {
    let broker = TestBroker::start();
    let tiger = broker.target("tiger");
    let (lion, views) = broker.viewer("lion", 7, Duration::ZERO);
    let granted = broker.grant(&GrantRequest { uses: 2, ..request(Rights::ReadOnly) });
    let view = views.open(&lion, &granted.token).unwrap().view;
    let mut deaf = Peer::register(&broker, introspector("deaf", 9), None);
    deaf.attach(&granted.token);
    let generation = || lion.current(view).unwrap().generation();
    // The socket's queue holds few hundred packets at most.
    wait_for("the one that does not read to be cut off", || {
        let before = generation();
        tiger.ram_changed(regions(), Change::Reset);
        // One that reads is given the time for it.
        wait_for("the other one to be told", || generation() > before);
        broker.state.number("deaf").is_none()
    });
    assert!(lion.is_connected() && views.count() == 1);
    assert_eq!(broker.admin().revoke(granted.grant).unwrap().views, 1);
}

#[test]
fn bad_changes_of_ram_change_nothing() {
    let broker = TestBroker::start();
    let mut tiger = Peer::register(&broker, target("tiger"), Some(ram()));
    let mut lion = Peer::register(&broker, introspector("lion", 7), None);
    let mut nobody = Peer::connect(&broker);
    let region = |gpa, len, offset| Region { gpa, len, offset, file: 0 };
    let bad = [
        vec![],
        vec![region(0, 0, 0)],
        vec![region(1, 0x1000, 0)],
        vec![region(0, 0x1000, 0x10_2000)],
        vec![region(!0xfff, 0x1000, 0)],
        vec![region(0, 1 << 51, 0)],
        vec![region(0, 0x2000, 0), region(0x1000, 0x1000, 0x2000)],
        vec![region(0, 0x1000, 0), region(0x1000, 0x1000, 0)],
        vec![region(0x1000, 0x1000, 0), region(0, 0x1000, 0x1000)],
        (0..65).map(|n| region(n << 12, 0x1000, n << 12)).collect(),
    ];
    let before = broker.state.layout(broker.state.number("tiger").unwrap()).unwrap().generation;
    for regions in bad {
        tiger.tell(Call::RamChanged { regions, change: Change::Resized });
    }
    for peer in [&mut lion, &mut nobody] {
        peer.tell(Call::RamChanged { regions: vec![region(0, 0x1000, 0)], change: Change::Reset });
        peer.ask(Call::Targets { after: 0 });
    }
    tiger.ask(Call::Targets { after: 0 });
    let layout = broker.state.layout(broker.state.number("tiger").unwrap()).unwrap();
    assert_eq!((layout.generation, layout.map.regions()), (before, &regions()[..]));
}

#[test]
fn a_generation_is_continued_once_by_the_first_call_and_only_to_an_earlier_one() {
    let broker = TestBroker::start();
    let generation =
        |name| broker.state.layout(broker.state.number(name).unwrap()).unwrap().generation;
    let tiger = Peer::register(&broker, target("tiger"), Some(ram()));
    let first = generation("tiger");
    let continued = |peer: &Peer, generation| peer.tell(Call::Continued { generation });
    let mut tiger = tiger;
    continued(&tiger, first - 7);
    tiger.ask(Call::Targets { after: 0 });
    assert_eq!(generation("tiger"), first - 7);
    for again in [first - 9, first, 0] {
        continued(&tiger, again);
        tiger.ask(Call::Targets { after: 0 });
        assert_eq!(generation("tiger"), first - 7);
    }
    let mut late = Peer::register(&broker, target("late"), Some(ram()));
    let first = generation("late");
    late.ask(Call::Targets { after: 0 });
    continued(&late, first - 1);
    late.ask(Call::Targets { after: 0 });
    assert_eq!(generation("late"), first);
    for (name, more) in [("same", 0), ("later", 1), ("last", u64::MAX)] {
        let mut peer = Peer::register(&broker, target(name), Some(ram()));
        let first = generation(name);
        continued(&peer, first.saturating_add(more));
        peer.ask(Call::Targets { after: 0 });
        assert_eq!(generation(name), first, "{name}");
    }
}

/// Ends the floods when it is dropped.
struct EndsFloods<'a>(&'a AtomicBool);

impl Drop for EndsFloods<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn floods_disturb_nobody() {
    let broker = TestBroker::start();
    let tiger = broker.target("tiger");
    let (lion, views) = broker.viewer("lion", 7, Duration::ZERO);
    let granted = broker.grant(&request(Rights::ReadOnly));
    let view = views.open(&lion, &granted.token).unwrap().view;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also where an assertion fails: the scope waits for the floods.
        let end = EndsFloods(&done);
        let floods: [fn(u64) -> Call; 6] = [
            |n| Call::Grant(GrantRequest { ttl_ms: 1 + n % 50, ..request(Rights::ReadOnly) }),
            |n| attach(&Token::new([n, 1, 2, 3])),
            // No grant has these numbers: an operator may revoke all that there are.
            |n| Call::Revoke { grant: u64::MAX - n },
            |n| Call::RevokedDone { grant: n % 4 },
            |n| Call::Detached { view: n % 4, counters: COUNTERS },
            |_| Call::Grants { after: Default::default() },
        ];
        for flood in floods {
            let (broker, done) = (&broker, &done);
            scope.spawn(move || {
                let mut peer = Peer::connect(broker);
                for n in 0.. {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    let call = flood(n);
                    if call.is_one_way() { peer.tell(call) } else { drop(peer.ask(call)) }
                }
            });
        }
        for _ in 0..50 {
            let other = broker.grant(&request(Rights::ReadOnly));
            views.open(&lion, &other.token).unwrap();
            let revoked = broker.admin().revoke(other.grant).unwrap();
            assert_eq!((revoked.views, revoked.unconfirmed), (1, 0));
            assert_eq!(views.count(), 1);
        }
        drop(end);
    });
    assert!(lion.current(view).is_some() && views.count() == 1);
    drop(tiger);
    wait_for("all to end", || broker.state.grant_count() == (0, 0));
}

#[test]
fn one_vmm_has_64_views_and_no_more() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let granted = broker.grant(&GrantRequest { uses: u32::MAX, ..request(Rights::ReadOnly) });
    let mut greedy = Peer::register(&broker, introspector("greedy", 9), None);
    for _ in 0..64 {
        greedy.attach(&granted.token);
    }
    assert_eq!(greedy.refusal(attach(&granted.token)), Refusal::Limit);
    let listed = &broker.grants()[0];
    assert_eq!((listed.uses_left, listed.views.len()), (u32::MAX - 64, 64));
    drop(greedy);
    wait_for("its views to end", || broker.state.grant_count().1 == 0);
}

#[test]
fn what_a_guest_calls_itself_is_shown_without_harm() {
    let broker = TestBroker::start();
    let _tiger = broker.target("tiger");
    let lion = broker.introspector("lion", 7);
    let granted = broker.grant(&request(Rights::ReadOnly));
    let evil = Caller { pid: 1, uid: 0, comm: format!("\u{1b}[2J\n{}", "x".repeat(1000)) };
    lion.attach(&granted.token, &evil, true).unwrap();
    let comm = &broker.grants()[0].views[0].comm;
    assert_eq!(comm.as_str(), "\u{fffd}[2J\u{fffd}xxxxxxxxxxx");
}

#[test]
fn the_longest_list_comes_whole() {
    let broker = TestBroker::start();
    let name = "\"".repeat(63);
    let large = Registration {
        regions: vec![Region { gpa: 0, len: 64 << 20, offset: 0, file: 0 }],
        ..target(&name)
    };
    let memory = memfd(64 << 20, SealFlags::SHRINK);
    let _tiger = VmmLink::connect(&broker.path, large, Some(memory)).unwrap();
    let lion = broker.introspector(&"\\".repeat(63), 7);
    let spans: Vec<Span> = (0..64).map(|n| Span { gpa: n << 20, len: 0x1000 }).collect();
    let asked = GrantRequest {
        target: name,
        spans: Some(spans),
        uses: 100,
        label: Some("\"".repeat(64)),
        ..request(Rights::ReadOnly)
    };
    for _ in 0..40 {
        broker.grant(&asked);
    }
    let granted = broker.grant(&asked);
    let strange = Caller { comm: "\u{1}".repeat(16), ..caller() };
    for _ in 0..64 {
        lion.attach(&granted.token, &strange, true).unwrap();
    }
    let listed = broker.grants();
    assert_eq!(listed.len(), 41);
    assert!(
        listed.iter().all(|grant| grant
            .scope
            .spans
            .as_ref()
            .is_some_and(|spans| spans.len() == 64))
    );
    assert_eq!(listed[40].views.len(), 64);
    // A name that no VM has is not repeated at length.
    let unknown = broker.admin().grant(&GrantRequest { target: "é".repeat(20_000), ..asked });
    assert!(
        matches!(&unknown, Err(ClientError::Refused { message, .. }) if message.len() < 200),
        "{unknown:?}"
    );
    assert_eq!(
        lion.attach(&Token::new([0; 4]), &caller(), true).unwrap_err(),
        RedeemError::Unknown
    );
}

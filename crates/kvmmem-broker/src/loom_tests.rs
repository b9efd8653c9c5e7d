// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The threads around the core under loom: the broker's lock, the outboxes, and the wait for
//! confirmations. What the core itself decides is in its `model`.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p kvmmem-broker --release --lib loom_tests`

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::map::Region;
use kvmmem_proto::message::{
    Answer, Call, Caller, FromBroker, GrantRequest, ViewCounters, VmIdentity,
};
use kvmmem_proto::packet::PacketSocket;
use loom::thread::{Builder, JoinHandle};

use crate::broker::Broker;
use crate::calls::Outcome;
use crate::core::limits::Limits;
use crate::peer::{Peer, Viewer};
use crate::ram::Ram;
use crate::registry::Vm;
use crate::sync::checked::{Condvar, Mutex, lock, wait_while};
use crate::test_peer::{Connection, grant_request, identity, ram};

const ROOT: Credentials = Credentials { pid: 1, uid: 0 };

/// Switches away from a thread that waits for nothing, in one run. One more than shows each fault
/// that these tests are for.
const PREEMPTIONS: usize = 3;

fn in_every_order(test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(PREEMPTIONS);
    let test = Arc::new(test);
    builder.check(move || {
        let test = Arc::clone(&test);
        spawn(move || test()).join().unwrap();
    });
}

/// Starts a thread with the stack that a call of a peer needs, in words; loom's own are smaller.
fn spawn<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    Builder::new().stack_size(0x8000).spawn(run).unwrap()
}

/// A broker with a target, and a grant of it that is good for two views.
struct Host {
    broker: Broker,
    operator: Arc<Peer>,
    target: Arc<Vm>,
    token: Token,
    grant: u64,
    /// What the core decided, in this order.
    decided: std::sync::Mutex<Vec<Push>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Push {
    Target,
    Revoke,
    Gone,
}

impl Host {
    fn new() -> Arc<Self> {
        let broker = Broker::new(Limits::default());
        let operator = Arc::new(Peer::unconnected(ROOT));
        broker.join(&operator);
        let regions = vec![Region { gpa: 0, len: 0x1000, offset: 0, file: 0 }];
        let memory = Ram::new(vec![ram()], regions).unwrap();
        let tiger = VmIdentity { introspectable: true, ..identity("tiger") };
        let vmm = Arc::new(Peer::unconnected(ROOT));
        let target = broker.register(tiger, &mut Some(memory), vmm, ROOT).unwrap();
        let (token, now) = (Token::from_bytes(&[7; Token::SIZE]), broker.now());
        let request = GrantRequest { uses: 2, ..grant_request("tiger") };
        let granted = broker.decide(|tables| tables.core.grant(now, ROOT, &request, &token));
        let grant = granted.unwrap().grant;
        Arc::new(Self {
            broker,
            operator,
            target,
            token,
            grant,
            decided: std::sync::Mutex::default(),
        })
    }

    /// The VMM of an introspector connects, and registers its VM.
    fn introspector(&self, name: &str, peer: Peer) -> Introspector {
        let peer = Arc::new(peer);
        self.broker.join(&peer);
        let identity = VmIdentity { introspector: true, ..identity(name) };
        let vm = self.broker.register(identity, &mut None, Arc::clone(&peer), ROOT).unwrap();
        Introspector { peer, vm }
    }

    fn viewer(&self, name: &str) -> (Introspector, Arc<Vmm>) {
        let vmm = Arc::new(Vmm::default());
        let viewer: Arc<dyn Viewer> = Arc::<Vmm>::clone(&vmm);
        (self.introspector(name, Peer::within(viewer, ROOT)), vmm)
    }

    fn call(&self, by: &Introspector, call: Call) -> Option<Answer> {
        match self.broker.handle(&by.peer, Some(&by.vm), call) {
            Ok(Outcome::Answer(answer, _)) => Some(answer),
            _ => None,
        }
    }

    fn attach(&self, by: &Introspector) -> Option<u64> {
        let caller = Caller { pid: 1, uid: 0, comm: "tool".into() };
        let token = self.token.clone();
        let call = Call::Attach { token, caller, read_only: true, reaching: Vec::new() };
        match self.call(by, call)? {
            Answer::Attached { view, .. } => Some(view),
            answer => panic!("{answer:?} is no answer to a VMM's attach"),
        }
    }

    /// An operator revokes the grant. Returns how many peers have not confirmed.
    fn revoke(&self) -> u32 {
        let call = Call::Revoke { grant: self.grant };
        match self.broker.handle(&self.operator, None, call) {
            Ok(Outcome::Answer(Answer::Revoked(report), _)) => report.unconfirmed,
            outcome => panic!("{outcome:?} is no answer to a revocation"),
        }
    }

    /// The core revokes the grant, and nothing waits.
    fn begin_revoke(&self) {
        let now = self.broker.now();
        self.broker.decide(|tables| {
            if tables.core.revoke(now, self.grant).is_ok_and(|it| !it.peers.is_empty()) {
                self.decided.lock().unwrap().push(Push::Revoke);
            }
        });
    }

    fn retire(&self) {
        self.broker.decide(|tables| {
            self.decided.lock().unwrap().push(Push::Gone);
            tables.core.vm_gone(self.target.id())
        });
    }

    fn decided(&self) -> Vec<Push> {
        self.decided.lock().unwrap().clone()
    }
}

#[derive(Clone)]
struct Introspector {
    peer: Arc<Peer>,
    vm: Arc<Vm>,
}

/// What the VMM of an introspector has in this process. It obeys the rules of [`Viewer`].
#[derive(Debug, Default)]
struct Vmm {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    view: View,
    revoked: VecDeque<u64>,
    told: Vec<Push>,
    is_over: bool,
}

#[derive(Debug, Default, PartialEq)]
enum View {
    #[default]
    None,
    Listed,
    Mapped,
}

impl Vmm {
    /// Maps a view, unless it has ended before it was listed.
    fn map(&self, host: &Host, by: &Introspector, view: u64) {
        lock(&self.state).view = View::Listed;
        let is_there = host.broker.reached(&by.peer, view).is_some();
        let mut state = lock(&self.state);
        if state.view == View::Listed {
            state.view = if is_there { View::Mapped } else { View::None };
        }
    }

    /// Releases and confirms what was revoked, until it is over.
    fn serve(&self, host: &Host, by: &Introspector) {
        loop {
            let is_quiet = |state: &mut State| state.revoked.is_empty() && !state.is_over;
            let state = lock(&self.state);
            let mut state = wait_while(&self.changed, state, Instant::now(), is_quiet);
            let Some(grant) = state.revoked.pop_front() else { return };
            state.view = View::None;
            drop(state);
            host.call(by, Call::RevokedDone { grant });
        }
    }

    fn end(&self) {
        lock(&self.state).is_over = true;
        self.changed.notify_all();
    }

    fn has_view(&self) -> bool {
        lock(&self.state).view == View::Mapped
    }
}

impl Viewer for Vmm {
    fn revoke(&self, grant: u64) {
        let mut state = lock(&self.state);
        state.revoked.push_back(grant);
        state.told.push(Push::Revoke);
        drop(state);
        self.changed.notify_all();
    }

    fn gone(&self, _target: u64) {
        lock(&self.state).told.push(Push::Gone);
    }

    fn changed(&self, _target: u64) {}
}

#[test]
fn loom_a_revocation_returns_once_no_peer_has_a_view() {
    in_every_order(|| {
        let host = Host::new();
        let (introspector, vmm) = host.viewer("lion");
        let (its, by) = ((Arc::clone(&host), Arc::clone(&vmm)), introspector.clone());
        let attaching = spawn(move || {
            if let Some(view) = its.0.attach(&by) {
                its.1.map(&its.0, &by, view);
            }
        });
        let its = (Arc::clone(&host), Arc::clone(&vmm));
        let serving = spawn(move || its.1.serve(&its.0, &introspector));
        assert_eq!(host.revoke(), 0);
        assert!(!vmm.has_view());
        assert_eq!(host.broker.grant_count().1, 0);
        vmm.end();
        attaching.join().unwrap();
        serving.join().unwrap();
        assert!(!vmm.has_view());
    });
}

#[test]
fn loom_a_revocation_returns_when_peers_close_their_views_and_leave() {
    in_every_order(|| {
        let host = Host::new();
        let ((one, _), (other, _)) = (host.viewer("lion"), host.viewer("lynx"));
        let view = host.attach(&one).unwrap();
        host.attach(&other).unwrap();
        let its = Arc::clone(&host);
        let closing = spawn(move || {
            its.call(&one, Call::Detached { view, counters: ViewCounters::default() })
        });
        let its = Arc::clone(&host);
        let leaving = spawn(move || its.broker.leave(&other.peer, None));
        assert!(host.revoke() <= 1);
        assert_eq!(host.broker.grant_count().1, 0);
        closing.join().unwrap();
        leaving.join().unwrap();
    });
}

#[test]
fn loom_a_peer_is_told_in_the_order_of_the_decisions() {
    in_every_order(|| {
        let host = Host::new();
        let (introspector, vmm) = host.viewer("lion");
        host.attach(&introspector).unwrap();
        let its = Arc::clone(&host);
        let retiring = spawn(move || its.retire());
        host.begin_revoke();
        retiring.join().unwrap();
        assert_eq!(lock(&vmm.state).told, host.decided());
    });
}

#[test]
fn loom_a_peer_is_told_of_a_target_first() {
    in_every_order(|| {
        let host = Host::new();
        let (mut connection, theirs) = Connection::pair();
        let socket = PacketSocket::accepted(theirs, Duration::from_secs(30)).unwrap();
        let introspector = host.introspector("lion", Peer::new(socket, ROOT));
        let (its, by) = (Arc::clone(&host), introspector.clone());
        let attaching = spawn(move || its.attach(&by).is_some());
        let its = Arc::clone(&host);
        let retiring = spawn(move || its.retire());
        host.begin_revoke();
        retiring.join().unwrap();
        let is_attached = attaching.join().unwrap();
        let expected = match is_attached {
            true => [vec![Push::Target], host.decided()].concat(),
            false => Vec::new(),
        };
        introspector.peer.shut_down();
        let told: Vec<_> = std::iter::from_fn(|| connection.next())
            .map(|(message, _)| match message {
                FromBroker::Target { .. } => Push::Target,
                FromBroker::Revoke { .. } => Push::Revoke,
                FromBroker::Gone { .. } => Push::Gone,
                message => panic!("{message:?} is not expected"),
            })
            .collect();
        assert_eq!(told, expected);
    });
}

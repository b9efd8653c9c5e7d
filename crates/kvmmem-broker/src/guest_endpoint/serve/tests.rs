// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest endpoint with a stand-in for the introspectors, over unix sockets: which VM a
//! connection comes from is what the test says.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::guest_endpoint::Listening;
use crate::guest_endpoint::connections::MAX_PER_CID;
use crate::guest_endpoint::listen::Accept;
use crate::test_wait::wait_for;

/// The VM that has views.
const CID: u32 = 7;

/// What the stand-in knows.
#[derive(Debug, Default)]
struct State {
    asked: Mutex<Vec<(u32, Token, Caller, bool)>>,
    open: AtomicUsize,
    revoked: AtomicBool,
    closed_by_tool: AtomicBool,
    waiter: Mutex<Option<(Reactor, reactor::Token)>>,
}

impl State {
    fn wake(&self) {
        if let (true, Some((reactor, token))) =
            (self.revoked.load(Ordering::SeqCst), &*self.waiter.lock().unwrap())
        {
            reactor.arm(*token, None, Some(Instant::now())).unwrap();
        }
    }
}

struct Fake(Arc<State>);

struct FakeView(Arc<State>);

impl Drop for FakeView {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

fn good_token() -> Token {
    Token::new([1, 2, 3, 4])
}

impl Views for Fake {
    type View = FakeView;

    fn may_ask(&self, cid: u32) -> Result<(), CallError> {
        match cid {
            CID => Ok(()),
            cid => Err(CallError::new(Refusal::Denied, format!("VM {cid} is no introspector"))),
        }
    }

    fn open(
        &self,
        cid: u32,
        token: &Token,
        caller: &Caller,
        read_only: bool,
        mapped_by: MappedBy,
    ) -> Result<FakeView, CallError> {
        assert_eq!(mapped_by, MappedBy::Module);
        self.0.asked.lock().unwrap().push((cid, token.clone(), caller.clone(), read_only));
        if *token != good_token() {
            return Err(CallError::new(Refusal::Unknown, "token is unknown"));
        }
        self.0.open.fetch_add(1, Ordering::SeqCst);
        Ok(FakeView(Arc::clone(&self.0)))
    }

    fn number(_: &FakeView) -> u64 {
        17
    }

    fn ticket(_: &FakeView) -> Token {
        Token::new([5, 6, 7, 8])
    }

    fn tool_has_closed(view: &FakeView) {
        view.0.closed_by_tool.store(true, Ordering::SeqCst);
    }

    fn has_ended(view: &FakeView) -> bool {
        view.0.revoked.load(Ordering::SeqCst)
    }

    fn wake_at_end(view: &FakeView, reactor: &Reactor, token: reactor::Token) {
        *view.0.waiter.lock().unwrap() = Some((reactor.clone(), token));
        view.0.wake();
    }
}

/// Connections come as the test sends them; an eventfd tells of each.
struct Queue {
    signal: Arc<OwnedFd>,
    connections: Mutex<Receiver<(OwnedFd, u32)>>,
}

impl AsFd for Queue {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.signal.as_fd()
    }
}

impl Accept for Queue {
    fn accept(&self) -> io::Result<(OwnedFd, u32)> {
        let _ = rustix::io::read(&self.signal, &mut [0; 8]);
        let next = self.connections.lock().unwrap().try_recv();
        next.map_err(|_| io::ErrorKind::WouldBlock.into())
    }
}

struct TestEndpoint {
    state: Arc<State>,
    signal: Arc<OwnedFd>,
    connections: Sender<(OwnedFd, u32)>,
    endpoint: Option<Listening>,
    reactor: Reactor,
}

impl Drop for TestEndpoint {
    fn drop(&mut self) {
        drop(self.endpoint.take());
        self.reactor.end();
    }
}

impl TestEndpoint {
    fn start() -> Self {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
        let signal = Arc::new(eventfd(0, flags).unwrap());
        let (connections, incoming) = channel();
        let state = Arc::new(State::default());
        let queue = Queue { signal: Arc::clone(&signal), connections: Mutex::new(incoming) };
        let reactor = Reactor::default();
        let endpoint = Listening::open(&reactor, queue, Fake(Arc::clone(&state))).unwrap();
        Self { state, signal, connections, endpoint: Some(endpoint), reactor }
    }

    /// Connects as a process of the VM `cid`.
    fn connect(&self, cid: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        self.connections.send((theirs.into(), cid)).unwrap();
        rustix::io::write(&self.signal, &1u64.to_ne_bytes()).unwrap();
        ours
    }

    fn open_views(&self) -> usize {
        self.state.open.load(Ordering::SeqCst)
    }
}

fn caller() -> Caller {
    Caller { pid: 4711, uid: 1000, comm: "scan".into() }
}

fn ask(stream: &mut UnixStream, token: Token) -> ToTool {
    guest::write(
        stream,
        &FromTool::Open { token, read_only: true, caller: caller(), mapped_by: MappedBy::Module },
    )
    .unwrap();
    answer(stream)
}

fn answer(stream: &mut UnixStream) -> ToTool {
    guest::read(stream).unwrap().expect("an answer")
}

/// Whether the guest endpoint has closed.
fn is_closed(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_))
}

#[test]
fn a_view_lasts_as_long_as_its_connection() {
    let endpoint = TestEndpoint::start();
    let mut tool = endpoint.connect(CID);
    assert_eq!(
        ask(&mut tool, good_token()),
        ToTool::Opened { view: 17, ticket: Token::new([5, 6, 7, 8]) }
    );
    assert_eq!(endpoint.open_views(), 1);
    assert_eq!(*endpoint.state.asked.lock().unwrap(), [(CID, good_token(), caller(), true)]);
    let mut other = endpoint.connect(CID);
    assert_eq!(
        ask(&mut other, good_token()),
        ToTool::Opened { view: 17, ticket: Token::new([5, 6, 7, 8]) }
    );
    drop(tool);
    wait_for("the view to close", || endpoint.open_views() == 1);
    assert!(endpoint.state.closed_by_tool.load(Ordering::SeqCst));
    drop(other);
    wait_for("the other to close", || endpoint.open_views() == 0);
}

#[test]
fn a_wrong_token_is_refused_and_the_connection_ends() {
    let endpoint = TestEndpoint::start();
    let mut tool = endpoint.connect(CID);
    let refused = ask(&mut tool, Token::new([4, 3, 2, 1]));
    assert_eq!(refused, ToTool::refused(Refusal::Unknown, "token is unknown"));
    assert!(is_closed(&mut tool));
    assert_eq!(endpoint.open_views(), 0);
}

#[test]
fn who_may_not_ask_is_told_why_and_its_token_is_not_looked_at() {
    let endpoint = TestEndpoint::start();
    let mut tool = endpoint.connect(8);
    let _ = guest::write(
        &mut tool,
        &FromTool::Open {
            token: good_token(),
            read_only: true,
            caller: caller(),
            mapped_by: MappedBy::Module,
        },
    );
    assert_eq!(answer(&mut tool), ToTool::refused(Refusal::Denied, "VM 8 is no introspector"));
    assert!(is_closed(&mut tool));
    assert!(endpoint.state.asked.lock().unwrap().is_empty());
}

#[test]
fn what_is_no_question_is_refused() {
    let endpoint = TestEndpoint::start();
    let opened = b"\x16\0\0\0{\"opened\":{\"view\":17}}";
    for bytes in
        [&b"\0\0\0\0"[..], b"\xff\xff\xff\xff", b"\x02\0\0\0{}", b"GET / HTTP/1.0\r\n\r\n", opened]
    {
        let mut tool = endpoint.connect(CID);
        tool.write_all(bytes).unwrap();
        let answer = answer(&mut tool);
        assert!(
            matches!(&answer, ToTool::Refused { refusal: Refusal::Malformed, .. }),
            "{bytes:?}: {answer:?}"
        );
        assert!(is_closed(&mut tool));
    }
    // Gone without a word, or in the middle of one.
    drop(endpoint.connect(CID));
    endpoint.connect(CID).write_all(b"\x16\0").unwrap();
    let mut tool = endpoint.connect(CID);
    assert!(matches!(ask(&mut tool, good_token()), ToTool::Opened { .. }));
}

#[test]
fn who_goes_on_talking_loses_the_view() {
    let endpoint = TestEndpoint::start();
    let mut tool = endpoint.connect(CID);
    assert!(matches!(ask(&mut tool, good_token()), ToTool::Opened { .. }));
    tool.write_all(b"?").unwrap();
    assert!(is_closed(&mut tool));
    wait_for("the view to close", || endpoint.open_views() == 0);
    assert!(!endpoint.state.closed_by_tool.load(Ordering::SeqCst));
}

#[test]
fn views_and_tools_that_wait_have_no_thread() {
    let endpoint = TestEndpoint::start();
    let mut tools: Vec<UnixStream> = (0..MAX_PER_CID).map(|_| endpoint.connect(CID)).collect();
    let (open, half) = tools.split_at_mut(MAX_PER_CID / 2);
    for tool in open.iter_mut() {
        assert!(matches!(ask(tool, good_token()), ToTool::Opened { .. }));
    }
    // These are late with their questions.
    half.iter_mut().for_each(|tool| tool.write_all(b"\x16\0").unwrap());
    let workers = endpoint.endpoint.as_ref().unwrap().workers.clone();
    wait_for("idle threads to end", || workers.threads() == 1);
    assert_eq!(endpoint.open_views(), MAX_PER_CID / 2);
    assert!(open.iter_mut().all(|tool| tool.shutdown(std::net::Shutdown::Write).is_ok()));
    wait_for("the views to close", || endpoint.open_views() == 0);
}

#[test]
fn a_view_that_has_ended_ends_its_connection() {
    let endpoint = TestEndpoint::start();
    let mut tool = endpoint.connect(CID);
    assert!(matches!(ask(&mut tool, good_token()), ToTool::Opened { .. }));
    endpoint.state.revoked.store(true, Ordering::SeqCst);
    endpoint.state.wake();
    assert!(is_closed(&mut tool));
    wait_for("the view to close", || endpoint.open_views() == 0);
    assert!(!endpoint.state.closed_by_tool.load(Ordering::SeqCst));
}

#[test]
fn a_vm_has_so_many_connections_and_gets_them_back() {
    let endpoint = TestEndpoint::start();
    let mut held: Vec<UnixStream> = (0..MAX_PER_CID).map(|_| endpoint.connect(CID)).collect();
    let mut one_more = endpoint.connect(CID);
    let refused = answer(&mut one_more);
    assert!(matches!(&refused, ToTool::Refused { refusal: Refusal::Limit, .. }), "{refused:?}");
    let mut first = held.swap_remove(0);
    assert!(matches!(ask(&mut first, good_token()), ToTool::Opened { .. }));
    drop(held);
    let attempts = AtomicU32::new(0);
    wait_for("a free slot", || {
        attempts.fetch_add(1, Ordering::Relaxed);
        let mut tool = endpoint.connect(CID);
        let question = FromTool::Open {
            token: good_token(),
            read_only: true,
            caller: caller(),
            mapped_by: MappedBy::Module,
        };
        let _ = guest::write(&mut tool, &question);
        matches!(answer(&mut tool), ToTool::Opened { .. })
    });
}

#[test]
fn an_endpoint_that_closes_ends_all_views() {
    let mut endpoint = TestEndpoint::start();
    let mut tool = endpoint.connect(CID);
    assert!(matches!(ask(&mut tool, good_token()), ToTool::Opened { .. }));
    // This one has not asked yet.
    let mut silent = endpoint.connect(CID);
    drop(endpoint.endpoint.take());
    assert_eq!(endpoint.open_views(), 0);
    assert!(is_closed(&mut tool) && is_closed(&mut silent));
    // A tool that is stopped has said nothing, and keeps what it has mapped.
    assert!(!endpoint.state.closed_by_tool.load(Ordering::SeqCst));
}

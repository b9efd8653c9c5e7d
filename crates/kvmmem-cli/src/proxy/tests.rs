// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A proxy whose views are those of a broker in this process: tools use it as they use a broker.

use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Mutex;

use kvmmem::{Access, Event, State, VectoredError, ViewError};
use kvmmem_broker::{Limits, Server};
use kvmmem_client::admin::{Admin, GrantRequest, NewGrant};
use kvmmem_client::vmm::{Region, VmIdentity, VmmLink};
use kvmmem_proto::client::{self, ClientError};
use kvmmem_proto::copy::{BUFFER, CopyAnswer, CopyRequest, Piece, Status};
use kvmmem_proto::message::{Answer, Call, Caller, Request};
use kvmmem_proto::packet::PacketBuffer;
use kvmmem_proto::scope::Rights;
use kvmmem_sys::ram::GuestRam;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::fs::{fallocate, fcntl_add_seals, memfd_create};
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, send, socketpair};
use uuid::Uuid;

use super::connection_limit::{MAX_TOOLS, MAX_WAITING_OF_USER};
use super::*;

/// Longer than any machine needs.
const PATIENCE: Duration = Duration::from_secs(60);

const LOW: u64 = 0x4000;
const HIGH: u64 = 0x10_0000;

struct TestProxy {
    directory: tempfile::TempDir,
    ram: GuestRam,
    vm: Option<VmmLink>,
    listener: OwnedFd,
    tools: Tools,
    _stop: UnixStream,
}

impl TestProxy {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let broker = directory.path().join("broker.sock");
        let limits = Limits { confirmation: PATIENCE, ..Limits::default() };
        let server = Server::bind_with(&broker, None, limits).unwrap();
        let (stop, other) = UnixStream::pair().unwrap();
        std::thread::spawn(move || server.run(other.as_fd()));
        let ram = GuestRam::new(2 * LOW).unwrap();
        let regions = vec![
            Region { gpa: 0, len: LOW, offset: 0, file: 0 },
            Region { gpa: HIGH, len: LOW, offset: LOW, file: 0 },
        ];
        let vm = VmIdentity::target("victim", Uuid::from_u128(7));
        let file = ram.fd().try_clone_to_owned().unwrap();
        let vm = Some(VmmLink::connect(&broker, vm.registered(regions), Some(file)).unwrap());
        let (listener, _) = listener::bind(&directory.path().join("proxy.sock"), None).unwrap();
        let attach: Arc<Attach> = Arc::new(move |token, access, caller| {
            assert_eq!(caller.pid, std::process::id());
            View::attach_host(&broker, token, access)
        });
        let tools = Tools::new(false, attach);
        Self { directory, ram, vm, listener, tools, _stop: stop }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn admin(&self) -> Admin {
        let mut admin = Admin::connect(&self.path("broker.sock")).unwrap();
        admin.limit_answers(PATIENCE).unwrap();
        admin
    }

    fn grant(&self, rights: Rights) -> NewGrant {
        let (target, ttl_ms, uses) = ("victim".to_owned(), 60_000, 4);
        let (spans, holder, label) = (None, None, None);
        let request = GrantRequest { target, spans, rights, ttl_ms, uses, holder, label };
        self.admin().grant(&request).unwrap()
    }

    /// What a process does that connects once.
    fn serve<T: Send>(&mut self, act: impl FnOnce(&Path) -> T + Send) -> T {
        let path = self.path("proxy.sock");
        std::thread::scope(|scope| {
            let acting = scope.spawn(move || act(&path));
            poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], None).unwrap();
            self.tools.admit(accept_with(&self.listener, SocketFlags::CLOEXEC).unwrap()).unwrap();
            acting.join().unwrap()
        })
    }

    fn attach(&mut self, grant: &NewGrant) -> Result<View, ViewError> {
        self.serve(|path| View::attach_host(path, &grant.token, Access::Granted))
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        rustix::io::pwrite(self.ram.fd(), bytes, offset).unwrap();
    }
}

#[test]
fn a_tool_reads_and_writes_by_copies() {
    let mut proxy = TestProxy::start();
    proxy.put(LOW - 4, b"low!high");
    let grant = proxy.grant(Rights::ReadWrite);
    let view = proxy.attach(&grant).unwrap();
    let status = view.status().unwrap();
    assert_eq!((status.state, status.is_writable), (State::Open, true));
    assert_eq!(status.uuid, *Uuid::from_u128(7).as_bytes());
    let [low, high] = [(0, LOW), (HIGH, LOW)].map(|(gpa, len)| kvmmem::Range { gpa, len });
    assert_eq!(status.ranges, [low, high]);
    let (mut ends, mut begins) = ([0; 4], [0; 4]);
    view.read_vectored(&mut [(LOW - 4, &mut ends), (HIGH, &mut begins)]).unwrap();
    assert_eq!((&ends, &begins), (b"low!", b"high"));
    let mut all = vec![0; usize::try_from(LOW).unwrap()];
    view.read_at(0, &mut all).unwrap();
    assert!(all.ends_with(b"low!"));
    let hole = view.read_at(LOW - 4, &mut [0; 8]).unwrap_err();
    assert!(matches!(hole, ViewError::Hole { gpa: LOW, .. }), "{hole}");
    let failed = view.read_vectored(&mut [(0, &mut [0; 8]), (LOW - 2, &mut [0; 8])]).unwrap_err();
    assert!(matches!(failed, VectoredError { piece: 1, source: ViewError::Hole { .. } }));
    view.write_at(HIGH + 1, b"ole").unwrap();
    let mut written = [0; 4];
    rustix::io::pread(proxy.ram.fd(), &mut written, LOW).unwrap();
    assert_eq!(&written, b"hole");
    assert!(matches!(view.map(low), Err(ViewError::Private { .. })));
    view.detach().unwrap();
    wait_for_views(&proxy, 0);
}

#[test]
fn a_tool_learns_why_its_view_has_ended() {
    let mut proxy = TestProxy::start();
    let grant = proxy.grant(Rights::ReadOnly);
    let view = proxy.attach(&grant).unwrap();
    assert!(matches!(view.write_at(0, b"x"), Err(ViewError::ReadOnly { .. })));
    let revoked = proxy.admin().revoke(grant.grant).unwrap();
    assert_eq!((revoked.views, revoked.unconfirmed), (1, 0), "{revoked:?}");
    assert_eq!(view.wait(PATIENCE).unwrap(), Some(Event::Revoked));
    assert!(matches!(view.read_at(0, &mut [0]), Err(ViewError::Revoked { .. })));
    let error = proxy.attach(&grant).unwrap_err();
    assert!(matches!(&error, ViewError::AttachHost { .. }), "{error}");

    let grant = proxy.grant(Rights::ReadOnly);
    let view = proxy.attach(&grant).unwrap();
    drop(proxy.vm.take());
    assert_eq!(view.wait(PATIENCE).unwrap(), Some(Event::Gone));
    assert!(matches!(view.read_at(0, &mut [0]), Err(ViewError::Gone { .. })));

    // The proxy ends.
    let mut proxy = TestProxy::start();
    let grant = proxy.grant(Rights::ReadOnly);
    let view = proxy.attach(&grant).unwrap();
    assert_eq!(proxy.tools.end(PATIENCE), 0);
    wait_for_views(&proxy, 0);
    assert_eq!(view.wait(PATIENCE).unwrap(), Some(Event::Gone));
}

#[test]
fn a_tool_is_told_that_its_view_is_still_being_opened() {
    let mut proxy = TestProxy::start();
    let token = proxy.grant(Rights::ReadOnly).token;
    let (release, gate) = std::sync::mpsc::channel::<()>();
    let (gate, attach) = (Mutex::new(gate), Arc::clone(&proxy.tools.attach));
    proxy.tools.attach = Arc::new(move |token, access, caller| {
        gate.lock().unwrap().recv().unwrap();
        attach(token, access, caller)
    });
    let socket = proxy.serve(|path| client::connect(path).unwrap());
    socket.limit_receive(Some(PATIENCE)).unwrap();
    let caller = Caller::this_process();
    let call = Call::Attach { token, caller, read_only: true, reaching: Vec::new() };
    socket.send(&Request { id: 1, call }, &[], Wait::Limited).unwrap();
    let mut buffer = PacketBuffer::default();
    let mut receive = || socket.receive::<FromBroker>(&mut buffer).unwrap().unwrap().0;
    assert!(matches!(receive(), FromBroker::Working));
    release.send(()).unwrap();
    let answer = loop {
        match receive() {
            FromBroker::Working => {}
            answer => break answer,
        }
    };
    let FromBroker::Answer { id: 1, answer: Answer::HostAttached { .. } } = answer else {
        panic!("{answer:?}")
    };
}

#[test]
fn an_operator_is_sent_to_the_broker_of_the_host() {
    let mut proxy = TestProxy::start();
    let refused = proxy.serve(|path| Admin::connect(path).unwrap().targets().unwrap_err());
    let ClientError::Refused { refusal: Refusal::Denied, message } = refused else {
        panic!("{refused}")
    };
    assert!(message.contains("kvmmem proxy"), "{message}");
}

#[test]
fn a_tool_that_breaks_the_protocol_ends_alone() {
    let mut proxy = TestProxy::start();
    let token = proxy.grant(Rights::ReadOnly).token;
    let socket = proxy.serve(|path| client::connect(path).unwrap());
    let mut buffer = PacketBuffer::default();
    let mut ask = |call, files: &[BorrowedFd<'_>]| {
        let asked = client::ask(&socket, &mut buffer, &Request { id: 1, call }, files, |_| {});
        asked.map_err(|error| match error {
            ClientError::Refused { refusal, .. } => refusal,
            error => panic!("{error}"),
        })
    };
    let attach = || {
        let (token, caller) = (token.clone(), Caller::this_process());
        Call::Attach { token, caller, read_only: true, reaching: Vec::new() }
    };
    let open = |view| Call::OpenCopies { view };
    assert_eq!(ask(open(1), &[]).unwrap_err(), Refusal::Denied);
    let (attached, _) = ask(attach(), &[]).unwrap();
    assert!(matches!(attached, Answer::HostAttached { view: 1, copied: true, .. }));
    for (call, refusal) in
        [(attach(), Refusal::Denied), (open(2), Refusal::Denied), (open(1), Refusal::Invalid)]
    {
        assert_eq!(ask(call, &[]).unwrap_err(), refusal);
    }
    let (null, pipe) = (File::open("/dev/null").unwrap(), rustix::pipe::pipe().unwrap().1);
    let unsealed = memfd_create("unsealed", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&unsealed, BUFFER as u64).unwrap();
    for file in [null.as_fd(), pipe.as_fd(), unsealed.as_fd()] {
        assert_eq!(ask(open(1), &[file]).unwrap_err(), Refusal::Invalid);
    }
    let mut channels = Vec::new();
    let refusal = loop {
        let file = memfd_create("sealed", MemfdFlags::ALLOW_SEALING).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, BUFFER as u64).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        match ask(open(1), &[file.as_fd()]) {
            Ok((_, files)) => channels.push((files.unwrap().pop().unwrap(), file)),
            Err(refusal) => break refusal,
        }
        assert!(channels.len() < 100);
    };
    assert_eq!(refusal, Refusal::Limit);
    // A channel ends where a request is malformed.
    let (socket, _file) = channels.pop().unwrap();
    assert_eq!(exchange(&socket, b"?"), b"");
    // A buffer is never written by `write`, which waits for the file's lock, that a tool can hold.
    let read = CopyRequest { id: 1, write: false, at: 0, pieces: vec![Piece { gpa: 0, len: 8 }] };
    let done = CopyAnswer { id: 1, status: Status::Done, pieces: 1, bytes: 0 };
    let (socket, file) = channels.pop().unwrap();
    for seal in [SealFlags::empty(), SealFlags::FUTURE_WRITE] {
        fcntl_add_seals(&file, seal).unwrap();
        let answer = CopyAnswer::decode(&exchange(&socket, &read.encode()));
        assert_eq!(answer, Some(done), "{seal:?}");
    }

    let socket = proxy.serve(|path| client::connect(path).unwrap());
    send(&socket, b"{", SendFlags::empty()).unwrap();
    let refused = socket.receive::<FromBroker>(&mut PacketBuffer::default()).unwrap();
    assert!(matches!(
        refused,
        Some((FromBroker::Refused { id: 0, refusal: Refusal::Malformed, .. }, _))
    ));
}

#[test]
fn a_file_that_takes_long_to_close_holds_up_neither_the_end_nor_other_tools() {
    let mut proxy = TestProxy::start();
    let grant = proxy.grant(Rights::ReadOnly);
    let (file, peer) = lingering();
    let (socket, theirs) = pair();
    let caller = Caller::this_process();
    let (token, reaching) = (grant.token.clone(), Vec::new());
    let attach = Call::Attach { token, caller, read_only: true, reaching };
    socket.send(&Request { id: 1, call: attach }, &[], Wait::Limited).unwrap();
    let open = Request { id: 2, call: Call::OpenCopies { view: 1 } };
    socket.send(&open, &[file.as_fd()], Wait::Limited).unwrap();
    // Only the packet has it now: the proxy closes it last.
    drop(file);
    proxy.tools.admit_as(theirs, this_process()).unwrap();
    let mut buffer = PacketBuffer::default();
    let mut receive = || loop {
        match socket.receive::<FromBroker>(&mut buffer).unwrap().unwrap().0 {
            FromBroker::Working => {}
            answer => break answer,
        }
    };
    assert!(matches!(receive(), FromBroker::Answer { id: 1, .. }));
    assert!(matches!(receive(), FromBroker::Refused { id: 2, refusal: Refusal::Invalid, .. }));
    let view = proxy.attach(&grant).unwrap();
    view.read_at(0, &mut [0]).unwrap();
    wait_for_views(&proxy, 2);
    drop(view);
    wait_for_views(&proxy, 1);
    let deadline = Instant::now() + PATIENCE;
    while proxy.tools.running.len() > 1 {
        assert!(Instant::now() < deadline, "the other tool's threads do not end");
        std::thread::sleep(END_LOOK);
        proxy.tools.forget_ended();
    }

    assert_eq!(proxy.tools.end(Duration::ZERO), 1, "the file was closed at once");
    wait_for_views(&proxy, 0);
    drop(peer);
    assert_eq!(proxy.tools.end(PATIENCE), 0);
}

#[test]
fn refused_tools_files_that_take_long_to_close_hold_up_no_other_and_have_one_thread() {
    let mut proxy = TestProxy::start();
    let grant = proxy.grant(Rights::ReadOnly);
    let open = Request { id: 1, call: Call::OpenCopies { view: 1 } };
    let refused = |_| {
        let (file, peer) = lingering();
        let (socket, theirs) = pair();
        socket.send(&open, &[file.as_fd()], Wait::Limited).unwrap();
        (theirs, peer)
    };
    let (sockets, peers): (Vec<_>, Vec<_>) = (0..40).map(refused).unzip();
    let (done, is_done) = std::sync::mpsc::channel();
    let closing = || {
        let threads = std::fs::read_dir("/proc/self/task").unwrap();
        let is_closer = |task: &io::Result<std::fs::DirEntry>| {
            let name = std::fs::read_to_string(task.as_ref().unwrap().path().join("comm"));
            name.is_ok_and(|name| name.starts_with("close"))
        };
        threads.filter(is_closer).count()
    };
    let threads = std::thread::scope(|scope| {
        let tools = &mut proxy.tools;
        // Only root may connect.
        let unknown = Credentials { pid: std::process::id(), uid: u32::MAX - 1 };
        scope.spawn(move || {
            sockets.into_iter().for_each(|socket| tools.admit_as(socket, unknown).unwrap());
            done.send(()).unwrap();
        });
        let refused = is_done.recv_timeout(PATIENCE);
        let threads = closing();
        drop(peers);
        refused.expect("they were closed at once");
        threads
    });
    // Those of other tests count too, where they run in this process.
    assert!(threads < 30, "{threads} threads close them");
    proxy.attach(&grant).unwrap();
}

#[test]
fn tools_without_a_token_keep_out_none_that_has_one() {
    let mut proxy = TestProxy::start();
    proxy.tools.admits_all = true;
    proxy.tools.ask_limit = PATIENCE * 60;
    let token = proxy.grant(Rights::ReadOnly).token;
    let mut connect = |uid| {
        let (socket, theirs) = pair();
        socket.limit_receive(Some(PATIENCE)).unwrap();
        let pid = std::process::id();
        proxy.tools.admit_as(theirs, Credentials { pid, uid }).unwrap();
        socket
    };
    let mut buffer = PacketBuffer::default();
    let users = MAX_TOOLS / MAX_WAITING_OF_USER;
    let mut idle = Vec::new();
    for uid in (1..).take(users) {
        idle.extend((0..MAX_WAITING_OF_USER).map(|_| connect(uid)));
        let refused = connect(uid).receive::<FromBroker>(&mut buffer).unwrap();
        let Some((FromBroker::Refused { refusal: Refusal::Limit, message, .. }, _)) = refused
        else {
            panic!("{refused:?}")
        };
        assert!(message.contains("no view"), "{message}");
    }
    assert_eq!(idle.len(), MAX_TOOLS);
    let socket = connect(u32::MAX - 1);
    let (caller, reaching) = (Caller::this_process(), Vec::new());
    let call = Call::Attach { token, caller, read_only: true, reaching };
    let request = Request { id: 1, call };
    let (answer, _) = client::ask(&socket, &mut buffer, &request, &[], |_| {}).unwrap();
    assert!(matches!(answer, Answer::HostAttached { .. }));
    // The oldest one is evicted.
    let told = idle[0].receive::<FromBroker>(&mut buffer).unwrap();
    let Some((FromBroker::Refused { refusal: Refusal::Limit, message, .. }, _)) = told else {
        panic!("{told:?}")
    };
    assert!(message.contains("ask again"), "{message}");
}

#[test]
fn a_proxy_replaces_the_socket_of_one_that_was_killed() {
    let mut proxy = TestProxy::start();
    let grant = proxy.grant(Rights::ReadOnly);
    let path = proxy.path("proxy.sock");
    // The kernel closes the listener, and leaves its name.
    proxy.listener = File::open("/dev/null").unwrap().into();
    let error = View::attach_host(&path, &grant.token, Access::ReadOnly).unwrap_err();
    assert!(matches!(error, ViewError::AttachHost { .. }) && path.exists(), "{error}");
    (proxy.listener, _) = listener::bind(&path, None).unwrap();
    proxy.attach(&grant).unwrap();
}

/// A socket, and its peer: the last close of the former waits until the latter is closed.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let file = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    set_socket_linger(&file, Some(PATIENCE * 60)).unwrap();
    file.set_nonblocking(true).unwrap();
    // More than the peer's buffer takes.
    while (&file).write(&[0; 1 << 16]).is_ok() {}
    (file, peer)
}

/// A tool's socket, and the end that the proxy accepts.
fn pair() -> (PacketSocket, OwnedFd) {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let (ours, theirs) = socketpair(family, kind, SocketFlags::CLOEXEC, None).unwrap();
    (PacketSocket::accepted(ours, SEND_LIMIT).unwrap(), theirs)
}

fn this_process() -> Credentials {
    Credentials { pid: std::process::id(), uid: rustix::process::geteuid().as_raw() }
}

/// The answer to a packet; nothing where the peer has closed.
fn exchange(socket: &OwnedFd, packet: &[u8]) -> Vec<u8> {
    send(socket, packet, SendFlags::NOSIGNAL).unwrap();
    let mut answer = vec![0; 64];
    let (_, count) = recv(socket, answer.as_mut_slice(), RecvFlags::empty()).unwrap();
    answer.truncate(count);
    answer
}

fn wait_for_views(proxy: &TestProxy, count: usize) {
    let deadline = std::time::Instant::now() + PATIENCE;
    let views = || {
        let grants = proxy.admin().grants().unwrap();
        grants.iter().map(|grant| grant.views.len()).sum::<usize>()
    };
    while views() != count {
        assert!(std::time::Instant::now() < deadline, "{} views", views());
        std::thread::sleep(Duration::from_millis(5));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A broker in this process, VMs without guests, and a tool.
#![allow(dead_code, reason = "each test program uses its own part")]

pub(crate) mod fake_qmp;
pub(crate) mod pair;
pub(crate) mod private;
pub(crate) mod qemu;

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvmmem_abi::errno::KvmError;
use kvmmem_broker::{Broker, Limits, Server, Service};
use kvmmem_client::admin::{Admin, GrantInfo, GrantRequest, NewGrant, RevokeReport};
use kvmmem_client::vmm::{
    Caller, RedeemError, Region, Registration, Rights, Target, ViewEvents, ViewGrant, VmIdentity,
    VmmLink,
};
use kvmmem_kvmi::handshake::{ToolHello, VmHello};
use kvmmem_kvmi::message::{HEADER_SIZE, Header};
use kvmmem_kvmi::reply::{self, Fixed, MapToken, Outcome};
use kvmmem_kvmi::request::Request;
use kvmmem_kvmi::token::Token;
use kvmmem_proto::endpoint::Endpoint;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use uuid::Uuid;

/// A broker, stopped on drop.
pub(crate) struct TestBroker {
    pub(crate) path: PathBuf,
    pub(crate) state: Arc<Broker>,
    pub(crate) service: Arc<Service>,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    pub(crate) directory: tempfile::TempDir,
}

/// Limits of time that no test reaches on a slow machine: revocations wait until all have confirmed
/// or ended, silent connections are kept, and tokens of KVMI's do not expire.
pub(crate) fn patient() -> Limits {
    let long = Duration::from_secs(3600);
    Limits { silence: long, confirmation: long, kvmi_lifetime: long, ..Limits::default() }
}

/// The same, but revocations wait for as long as those of users.
pub(crate) fn short_confirmation() -> Limits {
    Limits { confirmation: Limits::default().confirmation, ..patient() }
}

impl TestBroker {
    /// One that is [`patient`].
    pub(crate) fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    /// One with other limits.
    pub(crate) fn start_with(limits: Limits) -> Self {
        Self::start_so(tempfile::tempdir().unwrap(), limits)
    }

    pub(crate) fn start_in(directory: tempfile::TempDir) -> Self {
        Self::start_so(directory, patient())
    }

    fn start_so(directory: tempfile::TempDir, limits: Limits) -> Self {
        let path = directory.path().join("broker.sock");
        let server = Server::bind_with(&path, None, limits).unwrap();
        let service = server.service();
        let state = Arc::clone(service.broker());
        let (stop, stopped) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || server.run(stopped.as_fd()).unwrap());
        Self { path, state, service, stop: Some(stop), thread: Some(thread), directory }
    }

    /// Stops the broker; its directory can be used again.
    pub(crate) fn stop(mut self) -> tempfile::TempDir {
        self.end();
        std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap())
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// The lines of the audit log from now on.
    pub(crate) fn audit_log(&self) -> impl Fn() -> Vec<serde_json::Value> + use<> {
        let path = self.directory.path().join("audit.log");
        self.state.write_audit_to(&path).unwrap();
        move || {
            let text = std::fs::read_to_string(&path).unwrap();
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        }
    }

    pub(crate) fn target(&self, name: &str) -> VmmLink {
        VmmLink::connect(&self.path, target(name), Some(ram())).unwrap()
    }

    pub(crate) fn introspector(&self, name: &str, cid: u32) -> VmmLink {
        VmmLink::connect(&self.path, introspector(name, cid), None).unwrap()
    }

    /// An introspector whose VMM hears of what happens to its views.
    pub(crate) fn viewer(&self, name: &str, cid: u32, pause: Duration) -> (VmmLink, Arc<Views>) {
        let link = self.introspector(name, cid);
        let views = Arc::new(Views { pause, ..Views::default() });
        let events: Weak<Views> = Arc::downgrade(&views);
        link.set_events(events);
        (link, views)
    }

    pub(crate) fn admin(&self) -> Admin {
        let mut admin = Admin::connect(&self.path).unwrap();
        admin.limit_answers(PATIENCE).unwrap();
        admin
    }

    pub(crate) fn grant(&self, request: &GrantRequest) -> NewGrant {
        self.admin().grant(request).unwrap()
    }

    pub(crate) fn revoke(&self, grant: u64) -> RevokeReport {
        self.admin().revoke(grant).unwrap()
    }

    /// Makes a token as a hook to a tool in the VM with this context id does.
    pub(crate) fn mint(&self, target: u64, cid: u32) -> Result<Token, KvmError> {
        let vms = self.admin().targets().unwrap();
        let tool = vms.iter().find(|vm| vm.identity.cid == Some(cid)).map_or(0, |vm| vm.id);
        self.service.mint_token(target, Some(tool))
    }

    /// Makes a token as a hook to a tool on the host does.
    pub(crate) fn mint_bearer(&self, target: u64) -> Result<Token, KvmError> {
        self.service.mint_token(target, None)
    }

    pub(crate) fn grants(&self) -> Vec<GrantInfo> {
        self.admin().grants().unwrap()
    }
}

impl Drop for TestBroker {
    fn drop(&mut self) {
        self.end();
    }
}

/// Four pages from 0, a hole, two pages from 1 MiB.
pub(crate) fn regions() -> Vec<Region> {
    vec![
        Region { gpa: 0, len: 0x4000, offset: 0, file: 0 },
        Region { gpa: 0x10_0000, len: 0x2000, offset: 0x10_0000, file: 0 },
    ]
}

pub(crate) fn memfd(size: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

pub(crate) fn ram() -> OwnedFd {
    memfd(0x10_2000, SealFlags::SHRINK)
}

pub(crate) fn uuid(name: &str) -> Uuid {
    let mut bytes = [0xee; 16];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    Uuid::from_bytes(bytes)
}

pub(crate) fn target(name: &str) -> Registration {
    let target = VmIdentity::target(name, uuid(name));
    VmIdentity { vcpus: 2, start_time_ms: 1_700_000_000_000, ..target }.registered(regions())
}

pub(crate) fn introspector(name: &str, cid: u32) -> Registration {
    let vm = target(name).identity;
    VmIdentity { cid: Some(cid), introspectable: false, introspector: true, ..vm }
        .registered(vec![])
}

/// A VMM that keeps the views it has opened, as far as events have not ended them.
#[derive(Default)]
pub(crate) struct Views {
    pub(crate) open: Mutex<Vec<ViewGrant>>,
    pub(crate) log: Mutex<Vec<String>>,
    /// How long ending a view takes.
    pub(crate) pause: Duration,
}

impl Views {
    /// Opens a view as a VMM does: it counts once it is where events find it, unless it has ended
    /// by then.
    pub(crate) fn open(&self, link: &VmmLink, token: &Token) -> Result<ViewGrant, RedeemError> {
        let attached = link.attach(token, &caller(), false)?;
        let view = attached.view;
        self.open.lock().unwrap().push(attached.clone());
        if link.current(view).is_none() {
            self.end(|other| other.view == view);
            return Err(RedeemError::Unknown);
        }
        Ok(attached)
    }

    pub(crate) fn count(&self) -> usize {
        self.open.lock().unwrap().len()
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn end(&self, is_over: impl Fn(&ViewGrant) -> bool) {
        self.open.lock().unwrap().retain(|view| !is_over(view));
    }

    fn note(&self, text: String) {
        self.log.lock().unwrap().push(text);
    }
}

impl ViewEvents for Views {
    fn revoke(&self, grant: u64) -> bool {
        std::thread::sleep(self.pause);
        self.end(|view| view.grant == grant);
        self.note(format!("revoke {grant}"));
        true
    }

    fn gone(&self, target: u64) {
        self.end(|view| view.target.id() == target);
        self.note(format!("gone {target}"));
    }

    fn changed(&self, target: &Arc<Target>) {
        self.note(format!(
            "changed to {} with {} regions",
            target.generation(),
            target.map().regions().len()
        ));
    }

    fn lost(&self) {
        self.end(|_| true);
        self.note("lost".into());
    }
}

/// A process of the guest.
pub(crate) fn caller() -> Caller {
    Caller { pid: 4711, uid: 1000, comm: "scan".into() }
}

/// A grant of all of tiger's RAM.
pub(crate) fn request(rights: Rights) -> GrantRequest {
    GrantRequest {
        target: "tiger".into(),
        spans: None,
        rights,
        ttl_ms: 60_000,
        uses: 1,
        holder: None,
        label: None,
    }
}

/// Whether this process may open so many files; says so where the test has to be skipped.
pub(crate) fn may_open(files: usize) -> bool {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let is_enough = maximum.is_none_or(|most| most >= files as u64);
    if !is_enough {
        eprintln!(
            "skipped: {files} open files are needed, {maximum:?} are allowed: raise it with ulimit -n"
        );
    }
    is_enough
}

/// How long a test waits for what has to come: far longer than that takes on a machine with much
/// else to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Makes a program of a test's own by a name that it may not have elsewhere. Never by writing it
/// here: a thread that forks while a program is open for writing keeps it busy, and it cannot be
/// executed.
pub(crate) fn install(program: &Path, to: &Path) {
    if std::fs::hard_link(program, to).is_err() {
        let copied = std::process::Command::new("cp").arg(program).arg(to).status().unwrap();
        assert!(copied.success(), "cannot copy {}", program.display());
    }
}

/// Runs something on a thread of its own, and returns what it returns; fails where it does not
/// return.
#[track_caller]
pub(crate) fn returns<T: Send + 'static>(
    what: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || sender.send(run()).unwrap());
    match receiver.recv_timeout(PATIENCE) {
        Ok(value) => {
            thread.join().unwrap();
            value
        }
        Err(_) if thread.is_finished() => panic!("{what} failed"),
        Err(_) => panic!("still waiting: {what} does not return"),
    }
}

/// Waits until something holds.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "still waiting: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A tool that listens at a unix socket.
pub(crate) struct Tool {
    listener: UnixListener,
    pub(crate) endpoint: Endpoint,
}

impl Tool {
    pub(crate) fn listen(broker: &TestBroker, name: &str) -> Self {
        let path = broker.directory.path().join(name);
        Self { listener: UnixListener::bind(&path).unwrap(), endpoint: Endpoint::Unix(path) }
    }

    pub(crate) fn accept(&self) -> ToolSession {
        let (mut stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let hello = VmHello::receive(&mut stream).unwrap();
        ToolHello::default().send(&mut stream).unwrap();
        ToolSession { stream, hello }
    }

    /// Closes the connections that wait to be accepted.
    pub(crate) fn close_waiting(&self) {
        self.listener.set_nonblocking(true).unwrap();
        while self.listener.accept().is_ok() {}
        self.listener.set_nonblocking(false).unwrap();
    }
}

/// A tool's connection to a target.
pub(crate) struct ToolSession {
    pub(crate) stream: UnixStream,
    pub(crate) hello: VmHello,
}

impl ToolSession {
    pub(crate) fn ask(&mut self, request: Request<'_>) -> Result<Vec<u8>, KvmError> {
        let mut bytes = Vec::new();
        request.encode(1, &mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
        let mut header = [0; HEADER_SIZE];
        self.stream.read_exact(&mut header).unwrap();
        let header = Header::parse(&header).unwrap();
        assert_eq!((header.id.get(), header.seq.get()), (request.id(), 1));
        let mut payload = vec![0; header.size.get().into()];
        self.stream.read_exact(&mut payload).unwrap();
        match reply::decode(&payload).unwrap() {
            Outcome::Done(data) => Ok(data.to_vec()),
            Outcome::Failed(error) => Err(error),
        }
    }

    pub(crate) fn token(&mut self) -> Result<Token, KvmError> {
        self.ask(Request::GetMapToken).map(|data| MapToken::decode(&data).token())
    }

    /// Whether the other side has closed.
    pub(crate) fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0))
    }
}

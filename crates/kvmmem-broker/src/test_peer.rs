// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections to a broker in this process, in the name of any user, for tests.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::map::Region;
use kvmmem_proto::message::{Answer, Call, FromBroker, GrantRequest, Refusal, Request, VmIdentity};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};
use kvmmem_proto::scope::Rights;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use uuid::Uuid;

use crate::connection;
use crate::peer::Peer;
use crate::service::Service;

/// No user of the machine that tests run on.
pub(crate) const USER: u32 = 4_000_000_001;

/// A connection to a broker in this process, in the name of any user.
pub(crate) struct Connection {
    socket: Option<PacketSocket>,
    buffer: PacketBuffer,
    thread: Option<JoinHandle<()>>,
}

impl Connection {
    /// One that a thread of its own serves.
    pub(crate) fn new(service: &Arc<Service>, uid: u32) -> Self {
        let (mut connection, theirs) = Self::pair();
        let peer = PacketSocket::accepted(theirs, Duration::from_secs(30)).unwrap();
        let peer = Arc::new(Peer::new(peer, Credentials { pid: std::process::id(), uid }));
        let mut served = Some(connection::Connection::new(service, &peer));
        connection.thread = Some(std::thread::spawn(move || {
            while let Some(idle) = served.take() {
                served = idle.serve();
            }
        }));
        connection
    }

    /// A connection that is not served yet, and its other end.
    pub(crate) fn pair() -> (Self, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .unwrap();
        let socket = PacketSocket::accepted(pair.0, Duration::from_secs(30)).unwrap();
        socket.limit_receive(Some(Duration::from_secs(30))).unwrap();
        (Self { socket: Some(socket), buffer: PacketBuffer::default(), thread: None }, pair.1)
    }

    pub(crate) fn send(&self, call: Call, file: Option<OwnedFd>) {
        let files = file.as_ref().map(AsFd::as_fd);
        let socket = self.socket.as_ref().unwrap();
        // A broker that is full says so and closes, perhaps before this is sent.
        let _ = socket.send(&Request { id: 1, call }, files.as_slice(), Wait::Limited);
    }

    /// The next message and its files; `None` where the broker has closed.
    pub(crate) fn next(&mut self) -> Option<(FromBroker, Vec<OwnedFd>)> {
        self.socket.as_ref().unwrap().receive(&mut self.buffer).unwrap()
    }

    pub(crate) fn ask(
        &mut self,
        call: Call,
        file: Option<OwnedFd>,
    ) -> Result<Answer, (Refusal, String)> {
        self.send(call, file);
        loop {
            match self.next().expect("it was closed").0 {
                FromBroker::Answer { answer, .. } => return Ok(answer),
                FromBroker::Refused { refusal, message, .. } => return Err((refusal, message)),
                _ => {}
            }
        }
    }

    /// Sends what is no request, for which the broker ends the connection, and after it a file
    /// whose close blocks until the stream that is returned is dropped.
    pub(crate) fn break_off(&self) -> TcpStream {
        let (file, other_end) = lingering();
        let socket = self.socket.as_ref().unwrap();
        socket.send(&"nonsense", &[], Wait::Limited).unwrap();
        socket.send(&"a file", &[file.as_fd()], Wait::Limited).unwrap();
        other_end
    }

    /// Registers a target with one page of RAM.
    pub(crate) fn register_target(&mut self, name: &str) -> Result<Answer, (Refusal, String)> {
        let regions = vec![Region { gpa: 0, len: 0x1000, offset: 0, file: 0 }];
        let target = VmIdentity { introspectable: true, ..identity(name) };
        self.ask(Call::Register(target.registered(regions)), Some(ram()))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        drop(self.socket.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// A file whose last close blocks until the other end is dropped, and that.
pub(crate) fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let file = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other_end, _) = listener.accept().unwrap();
    set_socket_linger(&file, Some(Duration::from_secs(3600))).unwrap();
    file.set_nonblocking(true).unwrap();
    // More than the other end's buffer takes.
    while (&file).write(&[0; 1 << 16]).is_ok() {}
    (file, other_end)
}

/// A grant of all of a target's RAM, for a minute.
pub(crate) fn grant_request(target: &str) -> GrantRequest {
    GrantRequest {
        target: target.into(),
        spans: None,
        rights: Rights::ReadOnly,
        ttl_ms: 60_000,
        uses: 1,
        holder: None,
        label: None,
    }
}

pub(crate) fn identity(name: &str) -> VmIdentity {
    let uuid = Uuid::from_u128(name.bytes().fold(1, |sum, byte| sum << 8 | u128::from(byte)));
    VmIdentity { introspectable: false, ..VmIdentity::target(name, uuid) }
}

pub(crate) fn ram() -> OwnedFd {
    let file = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, 0x1000).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

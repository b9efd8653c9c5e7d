// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker's socket: takes it, accepts peers, gives it back.

mod activation;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::limit::RateLimit;
use kvmmem_proto::message::Refusal;
use kvmmem_proto::packet::PacketSocket;
use kvmmem_sys::socket::peer_credentials;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::broker::{Broker, Refused};
use crate::connection;
use crate::core::limits::Limits;
use crate::core::quota::{Exceeded, Quota};
use crate::peer::Peer;

/// A connection's stack: enough for the deepest packet that the parser takes, and so small that the
/// kernel backs none by a huge page.
const STACK: usize = 512 << 10;

/// How long a packet to a peer that does not read is waited for.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// How long the end of all connections is waited for.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

/// How long to wait when the system has no file descriptors or memory left.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Peers can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(2);

/// Why the broker cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another broker has the socket.
    #[error("another broker serves {0}")]
    InUse(PathBuf),
    /// Something that is no socket is in the way.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The lock file beside the socket cannot be taken.
    #[error("cannot lock {path}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("cannot listen at {path}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket that was passed is none that a broker can serve.
    #[error("cannot serve the socket that was passed")]
    Adopt(#[source] io::Error),
    /// Waiting for peers failed.
    #[error("cannot wait for connections")]
    Wait(#[source] Errno),
}

/// A listening broker.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: OwnedFd,
    /// Locked as long as the broker lives, so that no second one takes the socket away.
    _lock: File,
    group: bool,
    /// Whether the socket is somebody else's to remove.
    is_activated: bool,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    broker: Arc<Broker>,
    connections: Mutex<Connections>,
    ended: Condvar,
}

#[derive(Debug)]
struct Connections {
    peers: Vec<Arc<Peer>>,
    quota: Quota,
}

impl Server {
    /// Listens at `path`. The socket is its owner's (mode 0600), or also that of `group` (0660).
    ///
    /// # Errors
    /// [`ServerError`]. A socket that a broker left behind which did not end in order is replaced.
    pub fn bind(path: &Path, group: Option<u32>) -> Result<Self, ServerError> {
        Self::bind_with(path, group, Limits::default())
    }

    /// The same with other limits than the usual ones.
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub fn bind_with(path: &Path, group: Option<u32>, limits: Limits) -> Result<Self, ServerError> {
        let lock = lock(path)?;
        let listen = |source: io::Error| ServerError::Listen { path: path.to_owned(), source };
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(ServerError::NotASocket(path.to_owned()));
            }
            Ok(_) => std::fs::remove_file(path).map_err(listen)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(listen(error)),
        }
        let listener = listener(path, group).map_err(listen)?;
        let group = group.is_some();
        Ok(Self {
            path: path.to_owned(),
            listener,
            _lock: lock,
            group,
            is_activated: false,
            shared: Arc::new(Shared::new(limits)),
        })
    }

    /// The state that all connections share.
    pub fn broker(&self) -> Arc<Broker> {
        Arc::clone(&self.shared.broker)
    }

    /// Waits until all connections have ended, at most for so long. A client in the broker's own
    /// process, which has closed its connection, knows then that the audit log has what it did.
    pub fn waits_for_peers(&self) -> impl FnOnce(Duration) + Send + use<> {
        let shared = Arc::clone(&self.shared);
        move |limit| {
            shared.wait_for_peers(limit);
        }
    }

    /// Serves until `stop` becomes readable; then ends all connections and removes the socket if it
    /// made it.
    ///
    /// # Errors
    /// [`ServerError::Wait`].
    pub fn run(self, stop: BorrowedFd<'_>) -> Result<(), ServerError> {
        let served = self.accept_until(stop);
        // New peers find no socket from here on.
        if !self.is_activated
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
        self.shared.end();
        served
    }

    fn accept_until(&self, stop: BorrowedFd<'_>) -> Result<(), ServerError> {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::new(&self.listener, PollFlags::IN),
            ];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(ServerError::Wait(error)),
            }
            let [stopped, listening] = fds.map(|fd| !fd.revents().is_empty());
            if stopped {
                return Ok(());
            }
            if listening {
                self.accept();
            }
        }
    }

    fn accept(&self) {
        match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
            Ok(fd) => {
                if let Err(error) = self.admit(fd)
                    && WARNINGS.allow(Instant::now()).is_some()
                {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot serve a connection"
                    );
                }
            }
            Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                if WARNINGS.allow(Instant::now()).is_some() {
                    tracing::warn!("no file descriptor or memory is left for a new connection");
                }
                std::thread::sleep(EXHAUSTED_PAUSE);
            }
            // The peer was gone before it was accepted.
            Err(_) => {}
        }
    }

    /// Asks the kernel who has connected.
    fn admit(&self, fd: OwnedFd) -> io::Result<()> {
        let peer = peer_credentials(&fd)?;
        // A process outside of this pid namespace has no number here.
        self.admit_as(fd, Credentials { pid: peer.pid.unwrap_or(0), uid: peer.uid })
    }

    /// Checks who has connected, and starts a thread for it.
    fn admit_as(&self, fd: OwnedFd, credentials: Credentials) -> io::Result<()> {
        let uid = credentials.uid;
        let socket = PacketSocket::accepted(fd, SEND_LIMIT).map_err(io::Error::other)?;
        let peer = Arc::new(Peer::new(socket, credentials));
        // The socket's mode lets its owner in, and the group where there is one. Without a group
        // this is checked again here, in case somebody has changed the mode.
        if !credentials.is_administrator() && !self.group {
            let refused =
                Refused { refusal: Refusal::Denied, message: format!("user {uid} may not") };
            connection::refuse(&peer, 0, &refused);
            self.shared.broker.audit().refused(&peer, None, &refused.message);
            return Ok(());
        }
        let place = match Place::take(&self.shared, &peer) {
            Ok(place) => place,
            Err(error) => {
                let refused = Refused::new(Refusal::Limit, format!("connections: {error}"));
                connection::refuse(&peer, 0, &refused);
                self.shared.broker.audit().refused(&peer, None, &refused.message);
                return Ok(());
            }
        };
        std::thread::Builder::new().name("peer".into()).stack_size(STACK).spawn(move || {
            connection::serve(&place.shared.broker, &place.peer);
        })?;
        Ok(())
    }
}

impl Shared {
    fn new(limits: Limits) -> Self {
        let connections = Connections { peers: Vec::new(), quota: Quota::new(limits.connections) };
        Self {
            broker: Arc::new(Broker::new(limits)),
            connections: Mutex::new(connections),
            ended: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all connections have ended; returns how many have not.
    fn wait_for_peers(&self, limit: Duration) -> usize {
        let are_there = |connections: &mut Connections| !connections.peers.is_empty();
        let waited = self.ended.wait_timeout_while(self.lock(), limit, are_there);
        waited.unwrap_or_else(PoisonError::into_inner).0.peers.len()
    }

    /// Ends all connections, and with them the sessions, and waits for it.
    fn end(&self) {
        let deadline = Instant::now() + SHUTDOWN_LIMIT;
        self.broker.state().close();
        self.broker.remove_introspectors(deadline);
        self.broker.remove_external();
        for peer in &self.lock().peers {
            peer.shut_down();
        }
        let left = self.wait_for_peers(SHUTDOWN_LIMIT);
        while self.broker.hook_count() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let hooks = self.broker.hook_count();
        if left + hooks > 0 {
            tracing::warn!(connections = left, hooks, "not everything ended in time");
        }
    }
}

/// A connection's place among those that there may be, given back on drop.
struct Place {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
}

impl Place {
    fn take(shared: &Arc<Shared>, peer: &Arc<Peer>) -> Result<Self, Exceeded> {
        let mut connections = shared.lock();
        connections.quota.take(peer.credentials())?;
        connections.peers.push(Arc::clone(peer));
        Ok(Self { shared: Arc::clone(shared), peer: Arc::clone(peer) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = self.shared.lock();
        connections.peers.retain(|peer| !Arc::ptr_eq(peer, &self.peer));
        connections.quota.give_back(self.peer.credentials().uid);
        drop(connections);
        self.shared.ended.notify_all();
    }
}

/// Takes the lock beside the socket. The file stays: removing it would let two brokers hold "the"
/// lock.
fn lock(path: &Path) -> Result<File, ServerError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock_path = PathBuf::from(name);
    let fail = |source: io::Error| ServerError::Lock { path: lock_path.clone(), source };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&lock_path)
        .map_err(fail)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(ServerError::InUse(path.to_owned())),
        Err(error) => Err(fail(error.into())),
    }
}

/// A socket that listens at `path`, which nobody but its owner can connect to before it has its
/// final mode.
fn listener(path: &Path, group: Option<u32>) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::bind(&listener, &address)?;
    let ready = || -> io::Result<()> {
        // Nobody can connect before `listen`, so the mode is in force before anybody tries.
        if let Some(group) = group {
            std::os::unix::fs::chown(path, None, Some(group))?;
        }
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        std::fs::set_permissions(path, Permissions::from_mode(mode))?;
        Ok(rustix::net::listen(listener.as_fd(), 64)?)
    };
    match ready() {
        Ok(()) => Ok(listener),
        Err(error) => {
            // The path was free when it was bound, so what is there is ours.
            let _ = std::fs::remove_file(path);
            Err(error)
        }
    }
}

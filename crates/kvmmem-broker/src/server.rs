// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker's socket: accepts peers.

mod activation;
mod closer;
mod connections;
mod error;
#[cfg(test)]
mod tests;
mod thread;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use closer::Closer;
use connections::{ConnectionSlot, Shared};
pub use error::ServerError;
use kvmmem_limit::RateLimit;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::listener::{self, SocketLock};
use kvmmem_proto::message::Refusal;
use kvmmem_proto::packet::PacketSocket;
use kvmmem_sys::socket::peer_credentials;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::audit::Event;
use crate::connection;
use crate::core::call_error::CallError;
use crate::core::limits::Limits;
use crate::peer::Peer;
use crate::service::Service;

/// Permission bits of everybody but the owner.
const OTHERS: u32 = 0o077;

/// How long a packet to a peer that does not read is waited for.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// How long to wait when the system has no file descriptors or memory left.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Peers can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(2);

/// A listening broker.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: OwnedFd,
    /// Locked as long as the broker lives, so that no second one takes the socket away.
    _lock: SocketLock,
    group: bool,
    /// Whether the service manager removes the socket.
    is_activated: bool,
    shared: Arc<Shared>,
    closer: Closer,
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
        let (listener, lock) = listener::bind(path, group)?;
        let group = group.is_some();
        Ok(Self {
            path: path.to_owned(),
            listener,
            _lock: lock,
            group,
            is_activated: false,
            shared: Arc::new(Shared::new(limits)),
            closer: Closer::default(),
        })
    }

    /// Serves a listening socket of the service manager, which decides who may connect and removes
    /// it. The broker only takes the lock beside it.
    ///
    /// # Errors
    /// [`ServerError::Activation`] where it is no unix socket of sequenced packets with a path;
    /// [`ServerError::Listen`].
    pub(crate) fn from_activation(listener: OwnedFd) -> Result<Self, ServerError> {
        let (path, mode) = activation::inspect(&listener).map_err(ServerError::Activation)?;
        let lock = listener::lock(&path)?;
        let group = mode & OTHERS != 0;
        Ok(Self {
            path,
            listener,
            _lock: lock,
            group,
            is_activated: true,
            shared: Arc::new(Shared::new(Limits::default())),
            closer: Closer::default(),
        })
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What all connections share.
    pub fn service(&self) -> Arc<Service> {
        Arc::clone(&self.shared.service)
    }

    /// Waits until all connections have ended, at most for so long. A client in the broker's own
    /// process, which has closed its connection, knows then that the audit log has what it did.
    pub fn waits_for_peers(&self) -> impl FnOnce(Duration) + Send + use<> {
        let shared = Arc::clone(&self.shared);
        move |limit| {
            shared.wait_for_peers(Instant::now() + limit);
        }
    }

    /// Serves until `stop` becomes readable; then ends all connections and removes the socket if it
    /// made it.
    ///
    /// # Errors
    /// [`ServerError::Wait`].
    pub fn run(self, stop: BorrowedFd<'_>) -> Result<(), ServerError> {
        // Idle connections wait there; where it cannot be started now, they keep their threads.
        let _ = self.shared.service.reactor().start();
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
        // this is checked again here, in case the mode was changed.
        if !credentials.is_administrator() && !self.group {
            self.refuse(peer, &CallError::new(Refusal::Denied, format!("user {uid} may not")));
            return Ok(());
        }
        let slot = match ConnectionSlot::take(&self.shared, &peer) {
            Ok(slot) => slot,
            Err(error) => {
                let message = format!("connections: {error}");
                self.refuse(peer, &CallError::new(Refusal::Limit, message));
                return Ok(());
            }
        };
        if let Err((error, slot)) = thread::start(slot) {
            drop(slot);
            let message = format!("no thread can be started: {error}; try again later");
            self.refuse(peer, &CallError::new(Refusal::Limit, message));
        }
        Ok(())
    }

    /// Refuses a connection.
    fn refuse(&self, peer: Arc<Peer>, refused: &CallError) {
        connection::refuse(&peer, 0, refused);
        let (vm, reason) = (None, refused.message.as_str());
        self.shared.service.broker().audit().write(Event::Refused { peer: &peer, vm, reason });
        peer.shut_down();
        self.closer.close(peer);
    }
}

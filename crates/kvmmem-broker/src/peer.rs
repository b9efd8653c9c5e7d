// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker's end of a connection.
//!
//! Closing a socket may block for as long as its peer likes: a packet that was not received may
//! hold a file whose last close blocks, such as a TCP socket with `SO_LINGER`. Any thread may have
//! a [`Peer`], the reactor's and other connections' too, so dropping one must close nothing. The
//! connection's own thread takes the socket out when it ends ([`Peer::close`]); others use it under
//! a lock, for a moment, and never own it.

use std::fmt::Debug;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{FromBroker, VcpuQuestion};
use kvmmem_proto::packet::{PacketError, PacketSocket, Wait};
use kvmmem_qemu::questions::{Ask, AskError, Reply};
use kvmmem_sys::socket::unread;
use rustix::io::Errno;

use crate::audit::limits::Limits;
use crate::core::effect::Push;
use crate::outbox::{Outbox, Packet, QueueHead, Sending};
use crate::ram::Ram;
use crate::sync::lock;
use crate::vmm_questions::VmmQuestions;

/// How long a peer may take to read what was sent to it before it gets more descriptors.
pub(crate) const READ_LIMIT: Duration = Duration::from_secs(2);

/// The most channels for copies of one peer.
pub(crate) const MAX_CHANNELS: usize = 4;

/// How often it is looked at meanwhile.
pub(crate) const READ_PAUSE: Duration = Duration::from_millis(1);

/// Receives what the broker pushes to an introspector of this process.
///
/// The methods queue and return at once: the broker calls them from any thread. The introspector
/// looks up in the broker's tables what a target or a grant is by then.
pub(crate) trait Viewer: Debug + Send + Sync {
    /// A grant was revoked: its views end, and [`Broker::revoked_done`] confirms that.
    ///
    /// [`Broker::revoked_done`]: crate::broker::Broker::revoked_done
    fn revoke(&self, grant: u64);

    /// A target is gone: its views end.
    fn gone(&self, target: u64);

    /// A target was reset, or its RAM is elsewhere.
    fn changed(&self, target: u64);
}

/// How a peer is reached.
#[derive(Debug)]
enum Transport {
    /// A unix socket, until it is closed. Locked for reading while it is used; no other lock of
    /// the broker's is taken then, but the reactor's.
    Socket(RwLock<Option<PacketSocket>>),
    /// Calls within this process.
    Viewer(Arc<dyn Viewer>),
    /// Not at all: the VMM of a target that the broker has attached by itself.
    None,
}

/// A VMM, an operator or a process of the host.
#[derive(Debug)]
pub(crate) struct Peer {
    number: u64,
    transport: Transport,
    credentials: Mutex<Credentials>,
    outbox: Outbox,
    /// The sockets of its channels for copies. No other lock is taken with it.
    channels: Mutex<Vec<Arc<OwnedFd>>>,
    /// Held for reading while a channel copies what it has just looked up that it may.
    copying: RwLock<()>,
    limits: Limits,
    /// What it was asked about its VM's vCPUs.
    vcpu_questions: VmmQuestions,
}

impl Peer {
    /// The peer at the other end of a socket.
    pub(crate) fn new(socket: PacketSocket, credentials: Credentials) -> Self {
        Self::over(Transport::Socket(RwLock::new(Some(socket))), credentials)
    }

    /// An introspector of this process, whose VMM has these credentials.
    pub(crate) fn within(viewer: Arc<dyn Viewer>, credentials: Credentials) -> Self {
        Self::over(Transport::Viewer(viewer), credentials)
    }

    /// A VMM that knows nothing of the broker.
    pub(crate) fn unconnected(credentials: Credentials) -> Self {
        Self::over(Transport::None, credentials)
    }

    fn over(transport: Transport, credentials: Credentials) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        let credentials = Mutex::new(credentials);
        let (outbox, channels, copying) = (Outbox::default(), Mutex::default(), RwLock::default());
        let (limits, vcpu_questions) = (Limits::default(), VmmQuestions::default());
        Self { number, transport, credentials, outbox, channels, copying, limits, vcpu_questions }
    }

    /// Its number, never used again in this process.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Uses the connection; `None` where the peer has none, or it is closed. Only the connection's
    /// own thread may wait for the peer in this.
    pub(crate) fn with_socket<T>(&self, act: impl FnOnce(&PacketSocket) -> T) -> Option<T> {
        let Transport::Socket(socket) = &self.transport else { return None };
        socket.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(act)
    }

    /// Closes the connection, and the files of what waits to be sent over it. To be called by the
    /// connection's own thread, for it may block. Threads that still have the peer have no file by
    /// it from then on.
    pub(crate) fn close(&self) {
        // First, for it may be the last to have the RAM of other VMs.
        self.outbox.clear();
        if let Transport::Socket(socket) = &self.transport {
            let closed = socket.write().unwrap_or_else(PoisonError::into_inner).take();
            drop(closed);
        }
    }

    /// Sends a message over the connection.
    ///
    /// # Errors
    /// Where the peer does not read, or has no connection.
    pub(crate) fn send(
        &self,
        message: &FromBroker,
        files: &[BorrowedFd<'_>],
        wait: Wait,
    ) -> Result<(), PacketError> {
        let sent = self.with_socket(|socket| socket.send(message, files, wait));
        sent.unwrap_or(Err(PacketError::Send(Errno::NOTCONN)))
    }

    /// Ends the connection, if there is one.
    pub(crate) fn shut_down(&self) {
        self.with_socket(PacketSocket::shut_down);
    }

    /// Who it is.
    pub(crate) fn credentials(&self) -> Credentials {
        *lock(&self.credentials)
    }

    /// Records that another process continues the VM.
    pub(crate) fn replaced(&self, by: Credentials) {
        *lock(&self.credentials) = by;
    }

    /// How many lines of the audit log its VM has caused.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What it was asked about its VM's vCPUs.
    pub(crate) fn vcpu_questions(&self) -> &VmmQuestions {
        &self.vcpu_questions
    }

    /// Adds a channel for copies, unless there are [`MAX_CHANNELS`].
    pub(crate) fn add_channel(&self, socket: &Arc<OwnedFd>) -> bool {
        let mut channels = self.channels();
        let fits = channels.len() < MAX_CHANNELS;
        channels.extend(fits.then(|| Arc::clone(socket)));
        fits
    }

    /// Removes a channel for copies.
    pub(crate) fn remove_channel(&self, socket: &Arc<OwnedFd>) {
        self.channels().retain(|other| !Arc::ptr_eq(other, socket));
    }

    /// A copy begins; it has ended when this is dropped. To be called before it is looked up
    /// whether it is allowed.
    pub(crate) fn copying(&self) -> RwLockReadGuard<'_, ()> {
        self.copying.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no copy is under way that was looked up before now.
    pub(crate) fn wait_for_copies(&self) {
        drop(self.copying.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Ends all channels for copies: their threads return.
    pub(crate) fn end_channels(&self) {
        for socket in self.channels().iter() {
            // It fails only where the peer has closed.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
    }

    fn channels(&self) -> MutexGuard<'_, Vec<Arc<OwnedFd>>> {
        lock(&self.channels)
    }

    /// Waits until the peer has read all that was sent to it. At most one packet with descriptors
    /// is under way to a peer: the kernel counts them all as open files of the broker's user,
    /// and sends none beyond its limit.
    ///
    /// # Errors
    /// Where it does not read.
    pub(crate) fn wait_until_read(&self) -> Result<(), PacketError> {
        let deadline = Instant::now() + READ_LIMIT;
        while !self.has_read()? {
            if Instant::now() >= deadline {
                return Err(PacketError::Send(Errno::AGAIN));
            }
            std::thread::sleep(READ_PAUSE);
        }
        Ok(())
    }

    /// Whether the peer has read all that was sent to it.
    ///
    /// # Errors
    /// Where the connection is broken.
    pub(crate) fn has_read(&self) -> Result<bool, PacketError> {
        let Some(unread) = self.with_socket(|socket| unread(socket)) else { return Ok(true) };
        let unread = unread.map_err(|error| {
            PacketError::Send(Errno::from_io_error(&error).unwrap_or(Errno::IO))
        })?;
        Ok(unread == 0)
    }

    /// What waits to be sent.
    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Sends what waits to be sent.
    pub(crate) fn flush(&self) {
        let _ = self.flush_held(&self.outbox.sending());
    }

    /// Sends what waits, under the outbox's lock. A peer that does not read loses its connection:
    /// it would keep what it must not. A target or a token that cannot be sent is reported.
    ///
    /// # Errors
    /// The number of the target that the peer was not told of, if it was that.
    pub(crate) fn flush_held(&self, sending: &Sending<'_>) -> Result<(), NotSent> {
        let mut sent = Ok(());
        while let Some(next) = self.outbox.take(sending) {
            let QueueHead::Packet(packet) = next else {
                self.shut_down();
                break;
            };
            match &packet.0 {
                // The token's target may have failed.
                Push::Granted { .. } if sent.is_err() => {}
                Push::Target { target, .. } if self.push(&packet).is_err() => {
                    sent = Err(NotSent { target: Some(*target) });
                }
                Push::Granted { .. } if self.push(&packet).is_err() => {
                    sent = Err(NotSent { target: None });
                }
                Push::Target { .. } | Push::Granted { .. } => {}
                Push::Revoke { .. } | Push::Gone { .. } | Push::Changed { .. } => {
                    if self.push(&packet).is_err() {
                        self.shut_down();
                    }
                }
            }
        }
        sent
    }

    fn push(&self, (push, ram): &Packet) -> Result<(), PacketError> {
        match &self.transport {
            Transport::Socket(_) => {}
            Transport::Viewer(viewer) => {
                match push {
                    Push::Revoke { grant } => viewer.revoke(*grant),
                    Push::Gone { target } => viewer.gone(*target),
                    Push::Changed { target, .. } => viewer.changed(*target),
                    Push::Target { .. } | Push::Granted { .. } => {}
                }
                return Ok(());
            }
            Transport::None => return Ok(()),
        }
        let files = ram.as_deref().map(Ram::files).unwrap_or_default();
        self.send(&message(push), &files, Wait::No)
    }
}

impl Ask for Peer {
    fn put(&self, question: VcpuQuestion, reply: Option<Reply>) -> Result<(), AskError> {
        self.vcpu_questions.ask(question, reply, |message| self.send(message, &[], Wait::No))
    }
}

/// Something that was to be sent with files was not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotSent {
    /// The target that the peer was not told of.
    pub(crate) target: Option<u64>,
}

fn message(push: &Push) -> FromBroker {
    match push {
        Push::Target { target, introduction, identity, layout } => FromBroker::Target {
            id: *target,
            introduction: *introduction,
            name: identity.name.clone(),
            uuid: identity.uuid,
            generation: layout.generation,
            regions: layout.regions(),
        },
        Push::Granted { token, opened, lifetime } => FromBroker::Granted {
            token: token.clone(),
            grant: opened.grant,
            target: opened.target,
            scope: opened.scope.clone(),
            expires_in_ms: u64::try_from(lifetime.as_millis()).unwrap_or(0),
        },
        Push::Revoke { grant } => FromBroker::Revoke { grant: *grant },
        Push::Gone { target } => FromBroker::Gone { target: *target },
        Push::Changed { target, layout } => FromBroker::Changed {
            target: *target,
            generation: layout.generation,
            regions: layout.regions(),
        },
    }
}

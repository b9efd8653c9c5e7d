// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker's end of a connection: what it pushes, and to whom.

use std::collections::HashSet;
use std::fmt::Debug;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::FromBroker;
use kvmmem_proto::packet::{PacketError, PacketSocket, Wait};
use kvmmem_sys::socket::unread;
use rustix::io::Errno;

use crate::audit::Limits;
use crate::copies;
use crate::core::grants::{KVMI_LIFETIME, Opened};
use crate::ram::{Layout, Ram};
use crate::registry::Vm;
use crate::vmm_questions::VmmQuestions;

/// How long a peer may take to read what was sent to it before it gets more descriptors.
const READ_LIMIT: Duration = Duration::from_secs(2);

/// How often it is looked at meanwhile.
const READ_PAUSE: Duration = Duration::from_millis(1);

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
    /// A unix socket.
    Socket(PacketSocket),
    /// Calls within this process.
    Viewer(Arc<dyn Viewer>),
    /// Not at all: the VMM of a target that the broker has attached by itself.
    None,
}

/// A VMM, an operator or a process of the host.
#[derive(Debug)]
pub struct Peer {
    number: u64,
    transport: Transport,
    credentials: Mutex<Credentials>,
    /// The targets that it hears of. Held while pushing, so that the order of pushes is that of
    /// the changes.
    known: Mutex<HashSet<u64>>,
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
    pub fn new(socket: PacketSocket, credentials: Credentials) -> Self {
        Self::over(Transport::Socket(socket), credentials)
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
        let (known, channels, copying) = (Mutex::default(), Mutex::default(), RwLock::default());
        let (limits, vcpu_questions) = (Limits::default(), VmmQuestions::default());
        Self { number, transport, credentials, known, channels, copying, limits, vcpu_questions }
    }

    /// Its number, never used again in this process.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The connection; `None` where the peer has none.
    pub(crate) fn socket(&self) -> Option<&PacketSocket> {
        match &self.transport {
            Transport::Socket(socket) => Some(socket),
            Transport::Viewer(_) | Transport::None => None,
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
        let socket = self.socket().ok_or(PacketError::Send(Errno::NOTCONN))?;
        socket.send(message, files, wait)
    }

    /// Ends the connection, if there is one.
    pub(crate) fn shut_down(&self) {
        if let Some(socket) = self.socket() {
            socket.shut_down();
        }
    }

    /// Who it is.
    pub fn credentials(&self) -> Credentials {
        *self.credentials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note that another process goes on with what this one did.
    pub fn replaced(&self, by: Credentials) {
        *self.credentials.lock().unwrap_or_else(PoisonError::into_inner) = by;
    }

    /// How many lines of the audit log its VM has caused.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What it was asked about its VM's vCPUs.
    pub(crate) fn vcpu_questions(&self) -> &VmmQuestions {
        &self.vcpu_questions
    }

    /// Adds a channel for copies, unless there are [`copies::MAX_OF_PEER`].
    pub(crate) fn add_channel(&self, socket: &Arc<OwnedFd>) -> bool {
        let mut channels = self.channels();
        let fits = channels.len() < copies::MAX_OF_PEER;
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
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that the peer has been told of a target. Waits a while for a peer that has not
    /// read what was sent before: to be called on the peer's own thread.
    ///
    /// # Errors
    /// Where the peer does not read, or the target is gone.
    pub fn introduce(&self, target: &Vm) -> Result<(), PacketError> {
        let deadline = Instant::now() + READ_LIMIT;
        loop {
            match self.introduce_once(&mut self.known(), target) {
                Err(PacketError::Send(Errno::AGAIN)) if Instant::now() < deadline => {
                    std::thread::sleep(READ_PAUSE);
                }
                done => return done,
            }
        }
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

    fn has_read(&self) -> Result<bool, PacketError> {
        let Some(socket) = self.socket() else { return Ok(true) };
        let unread = unread(socket);
        let unread = unread.map_err(|error| {
            PacketError::Send(Errno::from_io_error(&error).unwrap_or(Errno::IO))
        })?;
        Ok(unread == 0)
    }

    /// Makes sure that the peer is told of what happens to a target whose RAM it gets otherwise;
    /// returns where that is now.
    ///
    /// # Errors
    /// Where the target is gone.
    pub fn watch(&self, target: &Vm) -> Result<Arc<Layout>, PacketError> {
        let mut known = self.known();
        let layout = present(target)?.layout();
        known.insert(target.id());
        Ok(layout)
    }

    /// Pushes a token for a target.
    ///
    /// # Errors
    /// Where the peer does not read, or the target is gone.
    pub fn grant(&self, target: &Vm, token: &Token, opens: Opened) -> Result<(), PacketError> {
        let mut known = self.known();
        self.introduce_once(&mut known, target)?;
        if self.socket().is_none() {
            return Ok(());
        }
        let granted = FromBroker::Granted {
            token: token.clone(),
            grant: opens.grant,
            target: opens.target,
            scope: opens.scope,
            expires_in_ms: u64::try_from(KVMI_LIFETIME.as_millis()).unwrap_or(0),
        };
        self.send(&granted, &[], Wait::No)
    }

    /// Tells the peer that a grant was revoked. One that does not read loses its connection: it
    /// would keep what it must not.
    pub fn revoke(&self, grant: u64) {
        match &self.transport {
            Transport::Viewer(viewer) => viewer.revoke(grant),
            _ => self.push(&FromBroker::Revoke { grant }),
        }
    }

    /// Tells the peer that a target is gone, if it knows it. One that does not read loses its
    /// connection.
    pub fn gone(&self, target: u64) {
        let mut known = self.known();
        if !known.remove(&target) {
            return;
        }
        match &self.transport {
            Transport::Viewer(viewer) => viewer.gone(target),
            _ => self.push(&FromBroker::Gone { target }),
        }
    }

    /// Tells the peer where a target's RAM is, if it knows it. One that does not read loses its
    /// connection.
    pub fn changed(&self, target: u64, layout: &Layout) {
        let known = self.known();
        if !known.contains(&target) {
            return;
        }
        match &self.transport {
            Transport::Viewer(viewer) => viewer.changed(target),
            _ => {
                let regions = layout.regions();
                self.push(&FromBroker::Changed { target, generation: layout.generation, regions });
            }
        }
    }

    fn push(&self, message: &FromBroker) {
        if self.send(message, &[], Wait::No).is_err() {
            self.shut_down();
        }
    }

    fn introduce_once(&self, known: &mut HashSet<u64>, target: &Vm) -> Result<(), PacketError> {
        let ram = present(target)?;
        if known.contains(&target.id()) {
            return Ok(());
        }
        // Whoever is introduced maps what comes with it.
        if ram.is_private() {
            return Err(PacketError::Send(Errno::OPNOTSUPP));
        }
        if self.socket().is_none() {
            known.insert(target.id());
            return Ok(());
        }
        if !self.has_read()? {
            return Err(PacketError::Send(Errno::AGAIN));
        }
        let (registration, layout) = (target.registration(), ram.layout());
        let introduction = FromBroker::Target {
            id: target.id(),
            name: registration.name.clone(),
            uuid: registration.uuid,
            generation: layout.generation,
            regions: layout.regions(),
        };
        self.send(&introduction, &ram.files(), Wait::No)?;
        known.insert(target.id());
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The RAM of a target that is there. Whoever removes a VM marks it first and then takes each
/// peer's lock: with the lock held, no introduction follows the news of its end.
fn present(target: &Vm) -> Result<&Ram, PacketError> {
    target.ram().filter(|_| !target.is_gone()).ok_or(PacketError::Send(Errno::NODEV))
}

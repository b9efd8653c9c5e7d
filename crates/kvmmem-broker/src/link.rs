// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM's connection to the broker.
//!
//! The VM is registered as long as the [`VmmLink`] lives. A thread of its own takes what the broker pushes, so that
//! a token that was pushed to this VM is claimed without asking anybody. When the broker goes away, that thread
//! connects and registers again, in the background; what the old broker had pushed is void then, but every
//! [`Target`] that somebody still holds stays usable.

mod cache;
mod reader;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uuid::Uuid;

pub use crate::map::Region;
use crate::map::{MapError, MemoryMap};
use crate::packet::{PacketError, PacketSocket, Wait};
pub use crate::wire::Registration;
use crate::wire::{Answer, Call, Refusal, Request};
use cache::Cache;
pub use kvmmem_kvmi::token::Token;

/// How long [`VmmLink::redeem`] waits for the broker.
const REDEEM_LIMIT: Duration = Duration::from_secs(2);

/// Another VM, of which this VM may map pages.
#[derive(Debug)]
pub struct Target {
    id: u64,
    name: String,
    uuid: Uuid,
    map: MemoryMap,
    ram: OwnedFd,
}

impl Target {
    /// The broker's number for it, unique while the broker runs.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its UUID.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The memfd of its RAM. It is sealed against shrinking and covers every region, so an access through a mapping
    /// of it never meets the file's end.
    pub fn ram(&self) -> BorrowedFd<'_> {
        self.ram.as_fd()
    }

    /// The offset in [`Self::ram`] of guest-physical address `gpa`, `None` in a hole of the memory map.
    pub fn resolve(&self, gpa: u64) -> Option<u64> {
        self.map.resolve(gpa)
    }
}

/// Why a VM is not registered.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The broker cannot be reached.
    #[error("cannot reach the broker at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        #[source]
        /// Why.
        source: PacketError,
    },
    /// The connection failed while registering.
    #[error("connection to the broker failed while registering the VM")]
    Packet(#[source] PacketError),
    /// The broker closed the connection or sent something else than an answer.
    #[error("the broker did not answer the registration")]
    NoAnswer,
    /// The broker does not take the VM.
    #[error("the broker refused to register the VM: {message}")]
    Refused {
        /// Which kind of refusal.
        refusal: Refusal,
        /// The broker's words.
        message: String,
    },
    /// The broker announced a target with an impossible memory map.
    #[error("the broker announced a target with a bad memory map")]
    Map(#[source] MapError),
    /// The reader's thread cannot be started.
    #[error("cannot start the thread that reads from the broker")]
    Thread(#[source] std::io::Error),
}

/// Why a token was not traded for a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedeemError {
    /// The token is unknown, used, expired or somebody else's.
    #[error("token is unknown, used or expired")]
    Unknown,
    /// The broker cannot be asked now.
    #[error("the broker cannot be reached")]
    Unavailable,
    /// This VM is not registered as an introspector.
    #[error("this VM may not map the memory of others")]
    Denied,
}

/// A registered VM's connection to the broker. Dropping it ends the registration.
#[derive(Debug)]
pub struct VmmLink {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

/// What the callers and the reader's thread share.
#[derive(Debug)]
struct Shared {
    path: PathBuf,
    registration: Registration,
    ram: Option<OwnedFd>,
    state: Mutex<State>,
    /// Signalled when an answer has come, the connection has ended, or the link is dropped.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// `None` while there is no registered connection.
    socket: Option<Arc<PacketSocket>>,
    cache: Cache,
    /// Pushed tokens that were used and of which the broker is not yet told.
    used: Vec<Token>,
    last_request: u64,
    /// Requests under way, and their answers once they have come.
    waiting: HashMap<u64, Option<Result<Answer, Refusal>>>,
    stopped: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VmmLink {
    /// Registers a VM with the broker that listens at `socket`; `ram` is the memfd of its RAM, needed where the VM is
    /// introspectable and sealed with `F_SEAL_SHRINK`.
    ///
    /// # Errors
    /// Where the broker cannot be reached or refuses.
    pub fn connect(
        socket: &Path,
        registration: Registration,
        ram: Option<OwnedFd>,
    ) -> Result<Self, LinkError> {
        let shared = Arc::new(Shared {
            path: socket.to_owned(),
            registration,
            ram,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let connection = reader::register(&shared)?;
        let reader = std::thread::Builder::new()
            .name("broker-link".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || reader::run(&shared, connection)
            })
            .map_err(LinkError::Thread)?;
        Ok(Self { shared, reader: Some(reader) })
    }

    /// Whether the VM is registered at this moment.
    pub fn is_connected(&self) -> bool {
        self.shared.lock().socket.is_some()
    }

    /// Trades a token for the target whose pages it allows to map; the token is used up.
    ///
    /// A token that was pushed to this VM costs no round trip; else the broker is asked, and waited for at most 2 s.
    ///
    /// # Errors
    /// Where the token is not good, or the broker cannot say.
    pub fn redeem(&self, token: &Token) -> Result<Arc<Target>, RedeemError> {
        let mut state = self.shared.lock();
        let socket = state.socket.clone().ok_or(RedeemError::Unavailable)?;
        if let Some(target) = state.cache.claim(Instant::now(), token) {
            state.used.push(token.clone());
            return Ok(target);
        }
        state.last_request += 1;
        let id = state.last_request;
        state.waiting.insert(id, None);
        drop(state);

        let sent = socket.send(&Request { id, call: Call::Redeem { token: token.clone() } }, None, Wait::No);
        let deadline = Instant::now() + REDEEM_LIMIT;
        let mut state = self.shared.lock();
        let answer = loop {
            // A lost connection takes the entry away.
            if sent.is_err() || !matches!(state.waiting.get(&id), Some(None)) {
                break state.waiting.remove(&id).flatten();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.waiting.remove(&id);
                break None;
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        match answer.ok_or(RedeemError::Unavailable)? {
            Ok(Answer::Redeemed { target }) => state.cache.target(target).ok_or(RedeemError::Unavailable),
            Ok(Answer::Pushed) => {
                let target = state.cache.claim(Instant::now(), token).ok_or(RedeemError::Unknown)?;
                state.used.push(token.clone());
                Ok(target)
            }
            Ok(_) => Err(RedeemError::Unavailable),
            Err(Refusal::Unknown) => Err(RedeemError::Unknown),
            Err(Refusal::Denied | Refusal::Invalid) => Err(RedeemError::Denied),
            Err(_) => Err(RedeemError::Unavailable),
        }
    }
}

impl Drop for VmmLink {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stopped = true;
        if let Some(socket) = state.socket.take() {
            socket.shut_down();
        }
        drop(state);
        self.shared.changed.notify_all();
        if let Some(reader) = self.reader.take() {
            // The thread does not panic; were it to, there would be nothing left to end.
            let _ = reader.join();
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM's connection to the broker.
//!
//! The VM is registered as long as the [`VmmLink`] lives. A thread of its own takes what the broker
//! pushes, so that a token that was pushed to this VM is claimed without asking anybody. When the
//! broker goes away, that thread connects and registers again, in the background; what the old
//! broker had pushed is void then, but every [`Target`] that somebody still holds stays usable.
//!
//! A second thread tells the VMM of what happens to its views ([`ViewEvents`]), so that answers go
//! on coming while the VMM is at work on an event. A third one has it answer for its vCPUs
//! ([`Vcpus`]).

mod cache;
mod events;
mod outbox;
mod reader;
mod vcpus;
mod views;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvmmem_proto::client::{self, ClientError};
use kvmmem_proto::map::MemoryMap;
pub use kvmmem_proto::map::Region;
use kvmmem_proto::map::SHARE_IT;
use kvmmem_proto::message::{Answer, Call, Refusal, Request};
pub use kvmmem_proto::message::{
    Caller, Change, Registration, SegmentRegister, VcpuAnswer, VcpuQuestion, VcpuRegisters,
    ViewCounters,
};
use kvmmem_proto::packet::{PacketSocket, Wait};
pub use kvmmem_proto::scope::{Rights, Scope, Span};
use uuid::Uuid;

use cache::Cache;
use events::Queue;
pub use events::ViewEvents;
pub use kvmmem_kvmi::token::Token;
use outbox::Outbox;
pub use vcpus::Vcpus;
use views::Views;

/// How long [`VmmLink::redeem`] and [`VmmLink::attach`] wait for the broker.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// What a token opened for one page.
#[derive(Clone, Debug)]
pub struct Redeemed {
    /// Number of the grant, unique while the broker runs.
    pub grant: u64,
    /// The other VM.
    pub target: Arc<Target>,
    /// Which of its pages may be mapped, and how.
    pub scope: Scope,
}

/// What a token opened for as long as it is not taken back.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Number of the view, unique while the broker runs.
    pub view: u64,
    /// Number of the grant, unique while the broker runs.
    pub grant: u64,
    /// The other VM.
    pub target: Arc<Target>,
    /// Which of its memory may be shown, and how.
    pub scope: Scope,
}

/// Another VM, of which this VM may map pages.
#[derive(Debug)]
pub struct Target {
    id: u64,
    name: String,
    uuid: Uuid,
    generation: u64,
    map: MemoryMap,
    /// Shared by all generations; as many as the memory map names, or more.
    files: Arc<[OwnedFd]>,
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

    /// A memfd of its RAM, by the number that [`Region::file`] has for it. It is sealed against
    /// shrinking and covers every region that lies in it, so an access through a mapping of one
    /// never meets the file's end.
    pub fn file(&self, index: u32) -> Option<BorrowedFd<'_>> {
        self.files.get(usize::try_from(index).ok()?).map(AsFd::as_fd)
    }

    /// Grows with each change of its RAM, as [`ViewEvents::changed`] tells. This object stays as it
    /// was.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Where its RAM is.
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// The number of the file that holds guest-physical address `gpa`, and the offset in it; `None`
    /// in a hole of the memory map.
    pub fn resolve(&self, gpa: u64) -> Option<(u32, u64)> {
        self.map.resolve(gpa)
    }
}

/// Why a token was not traded for a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedeemError {
    /// The token is unknown, used, expired or somebody else's.
    #[error("token is unknown, used, expired or revoked")]
    Unknown,
    /// The broker cannot be asked now.
    #[error("the broker cannot be reached")]
    Unavailable,
    /// This VM is not registered as an introspector.
    #[error("this VM may not map the memory of others")]
    Denied,
    /// The target's RAM is private to its VMM.
    #[error("the target's RAM is private to its VMM and cannot be mapped; {SHARE_IT}")]
    Private,
}

/// A registered VM's connection to the broker. Dropping it ends the registration.
#[derive(Debug)]
pub struct VmmLink {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What the callers and the link's threads share.
#[derive(Debug)]
struct Shared {
    /// Where the broker listens.
    path: PathBuf,
    files: Vec<OwnedFd>,
    state: Mutex<State>,
    /// Signalled when an answer has come, the connection has ended, something waits in
    /// [`State::events`], or the link is dropped.
    changed: Condvar,
    /// Calls that are not answered, in their order.
    outbox: Outbox,
}

#[derive(Debug)]
struct State {
    /// Said again to each broker.
    registration: Registration,
    /// The generation with which the VM was registered first; each of `changes` counts one more.
    first_generation: Option<u64>,
    /// How often its RAM has changed.
    changes: u64,
    /// `None` while there is no registered connection.
    socket: Option<Arc<PacketSocket>>,
    cache: Cache,
    views: Views,
    events: Queue,
    vcpus: vcpus::Questions,
    /// Connections that have ended.
    lost: u64,
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

impl State {
    /// A number for a request that will be waited for.
    fn begin_request(&mut self) -> u64 {
        self.last_request += 1;
        self.waiting.insert(self.last_request, None);
        self.last_request
    }
}

impl VmmLink {
    /// Registers a VM with the broker that listens at `socket`; `files` are the memfds of its RAM,
    /// needed where the VM is introspectable and sealed with `F_SEAL_SHRINK`.
    ///
    /// # Errors
    /// Where the broker cannot be reached or refuses.
    pub fn connect(
        socket: &Path,
        registration: Registration,
        files: impl IntoIterator<Item = OwnedFd>,
    ) -> Result<Self, ClientError> {
        let connected = client::connect(socket)?;
        Self::register(socket.to_owned(), connected, registration, files.into_iter().collect())
    }

    fn register(
        path: PathBuf,
        socket: PacketSocket,
        registration: Registration,
        files: Vec<OwnedFd>,
    ) -> Result<Self, ClientError> {
        let answers = registration.vcpu_questions;
        let state = State {
            registration,
            first_generation: None,
            changes: 0,
            socket: None,
            cache: Cache::default(),
            views: Views::default(),
            events: Queue::default(),
            vcpus: vcpus::Questions::default(),
            lost: 0,
            last_request: 0,
            waiting: HashMap::new(),
            stopped: false,
        };
        let shared = Arc::new(Shared {
            path,
            files,
            state: Mutex::new(state),
            changed: Condvar::new(),
            outbox: Outbox::default(),
        });
        let connection = reader::register(&shared, socket)?;
        let mut link = Self { shared, threads: Vec::new() };
        // A link that is dropped because of the second thread ends the first one.
        link.start("broker-link", move |shared| reader::run(shared, connection))?;
        link.start("broker-events", events::run)?;
        if answers {
            link.start("broker-vcpus", vcpus::run)?;
        }
        Ok(link)
    }

    fn start(
        &mut self,
        name: &str,
        run: impl FnOnce(&Shared) + Send + 'static,
    ) -> Result<(), ClientError> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(&shared));
        let no_thread = |source| ClientError::Local { what: "start a thread", source };
        self.threads.push(thread.map_err(no_thread)?);
        Ok(())
    }

    /// Ends the registration now, and not only when the link is dropped.
    pub fn close(&self) {
        let mut state = self.shared.lock();
        state.stopped = true;
        if let Some(socket) = state.socket.take() {
            socket.shut_down();
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Whether the VM is registered at this moment.
    pub fn is_connected(&self) -> bool {
        self.shared.lock().socket.is_some()
    }

    /// Says who is told of what happens to views, and to pages that were mapped by
    /// [`Self::redeem`]. A grant that is taken back is never confirmed to the broker without
    /// it.
    pub fn set_events(&self, events: Weak<dyn ViewEvents>) {
        self.shared.lock().events.set_handler(events);
        self.shared.changed.notify_all();
    }

    /// Says what answers the broker's questions about this VM's vCPUs, where the registration
    /// promised that ([`Registration::vcpu_questions`]). Before this they are answered with an
    /// error.
    pub fn set_vcpus(&self, vcpus: Weak<dyn Vcpus>) {
        self.shared.lock().vcpus.set_handler(vcpus);
        self.shared.changed.notify_all();
    }

    /// Trades a token for the target of which it allows to map a page; one use of the token is
    /// taken.
    ///
    /// A token that was pushed to this VM costs no round trip; else the broker is asked, and waited
    /// for at most 2 s. Once the page is mapped where [`ViewEvents::revoke`] finds it, the
    /// caller looks at [`Self::is_revoked`].
    ///
    /// # Errors
    /// Where the token is not good, or the broker cannot say.
    pub fn redeem(&self, token: &Token) -> Result<Redeemed, RedeemError> {
        let mut state = self.shared.lock();
        let socket = state.socket.clone().ok_or(RedeemError::Unavailable)?;
        if let Some(redeemed) = state.cache.claim(Instant::now(), token) {
            self.shared.outbox.push(Call::Used { token: token.clone() });
            return Ok(redeemed);
        }
        let id = state.begin_request();
        drop(state);

        let sent = socket.send(
            &Request { id, call: Call::Redeem { token: token.clone() } },
            &[],
            Wait::No,
        );
        let (mut state, answer) = self.answer(id, sent.is_ok());
        match answer? {
            Answer::Redeemed { grant, target, scope } => {
                let target = state.cache.target(target).ok_or(RedeemError::Unavailable)?;
                Ok(Redeemed { grant, target, scope })
            }
            Answer::Pushed => {
                let redeemed =
                    state.cache.claim(Instant::now(), token).ok_or(RedeemError::Unknown)?;
                self.shared.outbox.push(Call::Used { token: token.clone() });
                Ok(redeemed)
            }
            _ => Err(RedeemError::Unavailable),
        }
    }

    /// As [`Self::redeem`], for a token that was pushed to this VM.
    pub fn claim(&self, token: &Token) -> Option<Redeemed> {
        let redeemed = self.shared.lock().cache.claim(Instant::now(), token)?;
        self.shared.outbox.push(Call::Used { token: token.clone() });
        Some(redeemed)
    }

    /// How many connections were lost: the numbers of grants, views and targets start anew with
    /// each.
    pub fn connection(&self) -> u64 {
        self.shared.lock().lost
    }

    /// Tells that this VM's RAM was reset, or that it is elsewhere in its files now. Whoever has a
    /// view of it is told.
    pub fn ram_changed(&self, regions: Vec<Region>, change: Change) {
        let mut state = self.shared.lock();
        state.registration.regions.clone_from(&regions);
        state.changes += 1;
        drop(state);
        self.shared.outbox.push(Call::RamChanged { regions, change });
        self.shared.flush();
    }

    /// Waits for the answer to a request.
    fn answer(
        &self,
        id: u64,
        is_sent: bool,
    ) -> (MutexGuard<'_, State>, Result<Answer, RedeemError>) {
        let deadline = Instant::now() + ANSWER_LIMIT;
        let mut state = self.shared.lock();
        let answer = loop {
            // A lost connection takes the entry away.
            if !is_sent || !matches!(state.waiting.get(&id), Some(None)) {
                break state.waiting.remove(&id).flatten();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.waiting.remove(&id);
                break None;
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        let answer = match answer {
            Some(Ok(answer)) => Ok(answer),
            Some(Err(Refusal::Unknown)) => Err(RedeemError::Unknown),
            Some(Err(Refusal::Denied | Refusal::Invalid)) => Err(RedeemError::Denied),
            Some(Err(Refusal::Unsupported)) => Err(RedeemError::Private),
            Some(Err(_)) | None => Err(RedeemError::Unavailable),
        };
        (state, answer)
    }
}

impl Drop for VmmLink {
    fn drop(&mut self) {
        self.close();
        for thread in self.threads.drain(..) {
            // The handler of events may have held the last reference to the link.
            if thread.thread().id() != std::thread::current().id() {
                // The threads do not panic; were one to, there would be nothing left to end.
                let _ = thread.join();
            }
        }
    }
}

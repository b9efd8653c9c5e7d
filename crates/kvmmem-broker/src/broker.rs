// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What all connections and sessions share, and what the broker does for them.
//!
//! Lock order: `adding`, the registry, a peer's credentials; and a target's list of hooks, one of
//! them. No other two of the locks here, of a peer and of a hook are held together, and none over a
//! system call that may take long; but a peer's `copying` is held over a chunk's copy, and taken
//! first.

use std::collections::HashMap;
use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::map::Region;
use kvmmem_proto::message::{Answer, Change, KvmiPolicy, Refusal};

use crate::audit::Audit;
use crate::buffers::Buffers;
use crate::core::Core;
use crate::core::grants::View;
use crate::core::quota::{Limits, Quota};
use crate::external::watch::Watch;
use crate::hook::{HookError, Owner, driver};
use crate::introspector::Introspectors;
use crate::peer::Peer;
use crate::reactor::Reactor;
use crate::registry::{FIRST_CID, RegisterError, Registry, Vm};
use crate::state::State;
use crate::workers::Workers;

/// The most VMs in one answer to a list request; keeps it within a packet.
const PAGE: usize = 16;

/// Threads that handle the ends of targets' VMMs, and of introspectors'.
const ENDS: usize = 2;

/// The most threads that ask VMMs.
const SERVICES: usize = 32;

/// The most threads that serve hooks.
const SESSIONS: usize = 48;

/// The most of either that work for one party.
const SHARE: usize = 4;

/// How much of a name that no VM has is repeated, bytes.
const MAX_SHOWN: usize = 64;

/// The broker's state.
#[derive(Debug)]
pub struct Broker {
    limits: Limits,
    /// How far its clock is ahead of the system's, nanoseconds: tests let time pass.
    ahead: AtomicU64,
    registry: Mutex<Registry>,
    core: Mutex<Core>,
    /// Signalled when a revocation may be done. Goes with `core`.
    confirmed: Condvar,
    /// All connections, by number.
    peers: Mutex<HashMap<u64, Arc<Peer>>>,
    hooks: Mutex<Quota>,
    /// The VMMs of the VMs that the broker has attached by itself.
    external: Watch,
    /// Held while a VM is added whose RAM must be no other target's.
    adding: Mutex<()>,
    buffers: Buffers,
    /// Of channels for copies.
    channels: Mutex<Quota>,
    introspectors: Introspectors,
    state: State,
    audit: Audit,
    reactor: Reactor,
    /// For what follows from the ends of VMMs.
    ends: Workers,
    /// For what asks VMMs, and may take seconds.
    services: Workers,
    /// For the hooks' connections.
    sessions: Workers,
}

/// Why a request was refused.
#[derive(Debug)]
pub struct Refused {
    /// Which kind of failure.
    pub refusal: Refusal,
    /// The failure in words.
    pub message: String,
}

impl Refused {
    /// Of an error and all that is behind it: a peer gets one text.
    pub(crate) fn from_error(refusal: Refusal, error: &dyn Error) -> Self {
        Self { refusal, message: in_words(error) }
    }

    /// Of a VM that the registry does not take.
    pub(crate) fn from_registering(error: &RegisterError) -> Self {
        let refusal = match error {
            RegisterError::NameTaken(_)
            | RegisterError::UuidTaken(_)
            | RegisterError::CidTaken(_) => Refusal::Exists,
            RegisterError::Full(_) => Refusal::Limit,
            RegisterError::Name
            | RegisterError::NameIsUuid(_)
            | RegisterError::Uuid
            | RegisterError::Vcpus(_)
            | RegisterError::Cid(_)
            | RegisterError::NoRam
            | RegisterError::Ram(_) => Refusal::Invalid,
        };
        Self::from_error(refusal, error)
    }

    pub(crate) fn new(refusal: Refusal, message: impl ToString) -> Self {
        Self { refusal, message: message.to_string() }
    }
}

impl Default for Broker {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl Broker {
    /// A broker that knows no VM.
    pub fn new(limits: Limits) -> Self {
        let reactor = Reactor::default();
        let ends = Workers::new(&reactor, "vmm-watch", ENDS, ENDS);
        Self {
            limits,
            ahead: AtomicU64::new(0),
            registry: Mutex::new(Registry::new(limits.vms)),
            core: Mutex::new(Core::new(&limits)),
            confirmed: Condvar::new(),
            peers: Mutex::default(),
            hooks: Mutex::new(Quota::new(limits.hooks)),
            external: Watch::new(&reactor, &ends),
            adding: Mutex::default(),
            buffers: Buffers::default(),
            channels: Mutex::new(Quota::new(limits.channels)),
            introspectors: Introspectors::new(&reactor, &ends),
            state: State::default(),
            audit: Audit::default(),
            sessions: Workers::new(&reactor, "session", SESSIONS, SHARE),
            services: Workers::new(&reactor, "service", SERVICES, SHARE),
            ends,
            reactor,
        }
    }

    pub(crate) fn reactor(&self) -> &Reactor {
        &self.reactor
    }

    /// The threads that ask VMMs.
    pub(crate) fn services(&self) -> &Workers {
        &self.services
    }

    /// The threads that serve hooks.
    pub(crate) fn sessions(&self) -> &Workers {
        &self.sessions
    }

    /// How many of what there may be.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The time by which tokens expire.
    pub fn now(&self) -> Instant {
        Instant::now() + Duration::from_nanos(self.ahead.load(Ordering::Relaxed))
    }

    /// Lets time pass for tokens and grants, for tests.
    pub fn pass_time(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.ahead.fetch_add(nanos, Ordering::Relaxed);
    }

    /// The registered VMs.
    pub fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hooks(&self) -> MutexGuard<'_, Quota> {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<u64, Arc<Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn adding(&self) -> MutexGuard<'_, ()> {
        self.adding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn external(&self) -> &Watch {
        &self.external
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// Tells the broker that it lasts as long as one command: what it says of a VM to tell its runs
    /// apart is then by the VMM's process alone, so that the next command's broker says the
    /// same.
    pub fn set_brief(&self) {
        self.state.set_brief();
    }

    pub(crate) fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// How many channels for copies there are.
    pub(crate) fn channels(&self) -> MutexGuard<'_, Quota> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The introspectors under stock QEMUs.
    pub fn introspectors(&self) -> &Introspectors {
        &self.introspectors
    }

    /// Signalled when a revocation may be done.
    pub(crate) fn confirmed(&self) -> &Condvar {
        &self.confirmed
    }

    /// The audit log.
    pub fn audit(&self) -> &Audit {
        &self.audit
    }

    /// Sets what tokens allow that KVMI makes for targets that have no policy of their own.
    pub fn set_kvmi_tokens(&self, policy: KvmiPolicy) {
        self.core().policies.set_default(policy);
    }

    /// How many grants and views there are.
    pub fn grant_count(&self) -> (usize, usize) {
        self.core().grants.len()
    }

    /// A page of the VMs whose number is above `after`.
    pub fn list(&self, after: u64) -> Answer {
        let registry = self.registry();
        let mut vms = registry.after(after);
        let page: Vec<Arc<Vm>> = vms.by_ref().take(PAGE).cloned().collect();
        let more = vms.next().is_some();
        drop(vms);
        drop(registry);
        Answer::Targets { targets: page.iter().map(|vm| vm.info()).collect(), more }
    }

    /// Connects a target to a tool, for as long as both last.
    ///
    /// # Errors
    /// Where there is no such target or no such VM of a tool, the target has the hook already, or
    /// there are too many.
    pub fn hook(
        self: &Arc<Self>,
        peer: Credentials,
        target: &str,
        endpoint: Endpoint,
    ) -> Result<Answer, Refused> {
        let vm = self.find(target)?;
        if vm.ram().is_none() {
            return Err(Refused::new(Refusal::Denied, format!("{target:?} is not introspectable")));
        }
        let owner = self.owner_of(&endpoint, peer)?;
        let counted = Counted::new(self, peer)?;
        let hook = vm.hooks().add(endpoint.clone(), owner).map_err(refuse_hook)?;
        self.audit.hooked(&vm, &endpoint, true, peer);
        // The end of a VM is marked before the hooks to it are undone: one that was added since is
        // undone here.
        if let Owner::Vm(tool) = owner
            && self.registry().get(tool).is_none_or(|tool| tool.is_gone())
        {
            self.end_hooks(&vm, tool);
            return Err(Refused::new(Refusal::Unknown, "the tool's VM has just ended"));
        }
        let started = driver::start(self, &vm, hook, counted);
        if let Err(error) = started {
            // It was there a moment ago; a racing unhook is as good.
            let _ = vm.hooks().remove(&endpoint);
            return Err(Refused::new(Refusal::Limit, format!("cannot start the hook: {error}")));
        }
        Ok(Answer::Done)
    }

    /// Whose the tool at an endpoint is.
    fn owner_of(&self, endpoint: &Endpoint, asker: Credentials) -> Result<Owner, Refused> {
        match endpoint {
            Endpoint::Unix(_) => Ok(Owner::Host(asker)),
            Endpoint::Vsock { cid, .. } if *cid < FIRST_CID => {
                let message = format!(
                    "vsock context id {cid} is the host's; a tool on the host listens at a unix socket, unix:PATH"
                );
                Err(Refused::new(Refusal::Invalid, message))
            }
            Endpoint::Vsock { cid, .. } => {
                let vm = self.registry().with_cid(*cid);
                let unknown = || {
                    let message = format!(
                        "no VM with vsock context id {cid} is registered; start it, or add it with `kvmmem \
                         introspector add`, and hook it then"
                    );
                    Refused::new(Refusal::Unknown, message)
                };
                vm.map(|vm| Owner::Vm(vm.id())).ok_or_else(unknown)
            }
        }
    }

    /// Undoes a target's hooks to tools in a VM that is gone.
    fn end_hooks(&self, target: &Vm, tool: u64) {
        for endpoint in target.hooks().end_with(tool) {
            self.audit.unhooked(target, &endpoint, "the tool's VM is gone");
        }
    }

    /// Undoes a hook.
    ///
    /// # Errors
    /// Where there is no such target or hook.
    pub fn unhook(
        &self,
        peer: Credentials,
        target: &str,
        endpoint: &Endpoint,
    ) -> Result<Answer, Refused> {
        let vm = self.find(target)?;
        vm.hooks().remove(endpoint).map_err(refuse_hook)?;
        self.audit.hooked(&vm, endpoint, false, peer);
        Ok(Answer::Done)
    }

    /// Takes note of a new connection.
    pub(crate) fn join(&self, peer: &Arc<Peer>) {
        self.peers().insert(peer.number(), Arc::clone(peer));
    }

    /// A connection by its number.
    pub(crate) fn peer(&self, number: u64) -> Option<Arc<Peer>> {
        self.peers().get(&number).cloned()
    }

    /// Does what the end of a connection demands: its VM goes, and so do its views.
    pub(crate) fn leave(&self, peer: &Peer, vm: Option<&Vm>) {
        if let Some(vm) = vm {
            self.retire(vm);
        }
        peer.end_channels();
        self.peer_lost(peer.number());
        self.peers().remove(&peer.number());
    }

    /// Does what the end of a VM demands: its tokens and views die, its sessions end, whoever knows
    /// it is told.
    pub fn retire(&self, vm: &Vm) {
        vm.mark_gone();
        let removed = self.registry().remove(vm.id());
        drop(removed);
        let ended = self.core().target_gone(vm.id());
        vm.hooks().close();
        if vm.registration().cid.is_some() {
            let targets: Vec<Arc<Vm>> = self.registry().after(0).cloned().collect();
            targets.iter().for_each(|target| self.end_hooks(target, vm.id()));
        }
        for peer in self.all_peers() {
            peer.gone(vm.id());
        }
        self.tell_ended(&ended, "the target is gone");
        self.state.forget(vm.id());
        self.audit.gone(vm);
    }

    /// Takes note that a VM was reset, or has other RAM in its memfd; whoever knows it is told.
    ///
    /// # Errors
    /// Where the VM has no RAM to look at, or the regions are no memory map.
    pub fn ram_changed(
        &self,
        vm: Option<&Vm>,
        regions: Vec<Region>,
        change: Change,
    ) -> Result<(), Refused> {
        let ram = vm.and_then(|vm| Some((vm, vm.ram()?)));
        let (vm, ram) = ram.ok_or_else(|| {
            Refused::new(Refusal::Denied, "only the VMM of an introspectable VM may change its RAM")
        })?;
        ram.change(regions).map_err(|error| Refused::from_error(Refusal::Invalid, &error))?;
        let layout = ram.layout();
        for peer in self.all_peers() {
            peer.changed(vm.id(), &layout);
        }
        self.audit.ram_changed(vm, change);
        self.state().changed(vm);
        Ok(())
    }

    /// Continues the generation that a VM's RAM had in its registration before.
    ///
    /// # Errors
    /// Where the connection has registered no introspectable VM, or the generation is not an
    /// earlier one.
    pub(crate) fn ram_continued(&self, vm: Option<&Vm>, generation: u64) -> Result<(), Refused> {
        let ram = vm.and_then(|vm| Some((vm, vm.ram()?)));
        let (vm, ram) = ram.ok_or_else(|| {
            Refused::new(
                Refusal::Denied,
                "only the VMM of an introspectable VM may say its generation",
            )
        })?;
        let first = ram.layout().generation;
        if generation >= first {
            let message = format!(
                "generation {generation} is of no earlier registration: this one began with {first}"
            );
            return Err(Refused::new(Refusal::Invalid, message));
        }
        ram.continue_from(generation);
        let layout = ram.layout();
        for peer in self.all_peers() {
            peer.changed(vm.id(), &layout);
        }
        Ok(())
    }

    /// Records that a connection has ended, or never was.
    pub(crate) fn peer_lost(&self, peer: u64) {
        let closed = self.core().peer_lost(self.now(), peer);
        self.confirmed.notify_all();
        self.tell_ended(&closed, "the connection ended");
    }

    /// Writes down which views have ended.
    pub(crate) fn tell_ended(&self, views: &[View], reason: &str) {
        for view in views {
            let peer = self.peer(view.peer);
            self.audit.detached(view, peer.as_deref(), reason);
        }
    }

    fn all_peers(&self) -> Vec<Arc<Peer>> {
        self.peers().values().cloned().collect()
    }

    /// How many hooks there are.
    pub fn hook_count(&self) -> usize {
        self.hooks().count()
    }

    /// A VM by its name or its UUID; the target, where an introspector has the same UUID.
    ///
    /// # Errors
    /// Where there is none.
    pub fn find(&self, target: &str) -> Result<Arc<Vm>, Refused> {
        let found = self.registry().find(target, |registration| registration.introspectable);
        found.ok_or_else(|| no_vm(target))
    }

    /// A VM by its name or its UUID; the introspector, where a target has the same UUID.
    ///
    /// # Errors
    /// Where there is none.
    pub(crate) fn find_introspector(&self, name: &str) -> Result<Arc<Vm>, Refused> {
        let found = self.registry().find(name, |registration| registration.introspector);
        found.ok_or_else(|| no_vm(name))
    }
}

fn no_vm(name: &str) -> Refused {
    let name = name.get(..name.floor_char_boundary(MAX_SHOWN)).unwrap_or_default();
    Refused::new(
        Refusal::Unknown,
        format!(
            "no VM is named {name:?}; see `kvmmem target list`, or `kvmmem host discover` for those to add"
        ),
    )
}

impl Drop for Broker {
    fn drop(&mut self) {
        // It needs the reactor for its own end.
        self.introspectors.close_guest_endpoint();
        self.reactor.end();
        self.ends.end();
        self.services.end();
        self.sessions.end();
    }
}

/// A hook among those that there may be, given back on drop.
#[derive(Debug)]
pub(crate) struct Counted {
    broker: Weak<Broker>,
    uid: u32,
}

impl Counted {
    fn new(broker: &Arc<Broker>, who: Credentials) -> Result<Self, Refused> {
        broker
            .hooks()
            .take(who)
            .map_err(|error| Refused::new(Refusal::Limit, format!("hooks: {error}")))?;
        Ok(Self { broker: Arc::downgrade(broker), uid: who.uid })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(broker) = self.broker.upgrade() {
            broker.hooks().give_back(self.uid);
        }
    }
}

fn refuse_hook(error: HookError) -> Refused {
    let refusal = match error {
        HookError::Exists(_) => Refusal::Exists,
        HookError::Unknown(_) | HookError::Gone => Refusal::Unknown,
        HookError::Full => Refusal::Limit,
    };
    Refused::new(refusal, error)
}

/// An error and what is behind it, in one line.
pub(crate) fn in_words(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words.push_str(": ");
        words.push_str(&error.to_string());
        source = error.source();
    }
    words
}

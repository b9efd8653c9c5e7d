// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What all connections and sessions share, and what the broker does for them.
//!
//! One lock guards all that is decided (`Tables`); it is never held over a system call. The other
//! locks of the broker are of files, sockets and threads, and are held alone, but for three: `adding`
//! and a peer's outbox are taken before it, and a peer's `copying`, which is held over a chunk's
//! copy.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::map::Region;
use kvmmem_proto::message::{Answer, Change, KvmiPolicy, Refusal, Registration};
use kvmmem_proto::scope::Scope;
use kvmmem_qemu::monitor::Monitors;

use crate::audit::Audit;
use crate::buffers::Buffers;
use crate::core::Core;
use crate::core::limits::Limits;
pub use crate::core::refused::Refused;
pub(crate) use crate::core::refused::in_words;
use crate::core::vms::{FIRST_CID, NewVm, RegisterError};
use crate::effects::Tables;
use crate::external::watch::Watch;
use crate::hook::{HookError, Owner, driver};
use crate::introspector::Introspectors;
use crate::peer::Peer;
use crate::ram::Ram;
use crate::reactor::Reactor;
use crate::registry::Vm;
use crate::state::State;
use crate::workers::Workers;

/// The most VMs in one answer to a list request; keeps it within a packet.
const PAGE: usize = 16;

/// Threads that handle the ends of targets' VMMs, and of introspectors'.
const ENDS: usize = 2;

/// The most threads that ask VMMs.
const SERVICES: usize = 24;

/// The most threads that serve hooks.
const SESSIONS: usize = 48;

/// The most of either that work for one party.
const SHARE: usize = 4;

/// The broker's state.
#[derive(Debug)]
pub struct Broker {
    limits: Limits,
    /// How far its clock is ahead of the system's, nanoseconds: tests let time pass.
    ahead: AtomicU64,
    tables: Mutex<Tables>,
    /// Signalled when a revocation may be done. Goes with `tables`.
    confirmed: Condvar,
    /// The VMMs of the VMs that the broker has attached by itself.
    external: Watch,
    /// Held while a VM is added whose RAM must be no other target's.
    adding: Mutex<()>,
    buffers: Buffers,
    introspectors: Introspectors,
    /// The QMP connections that last.
    monitors: Monitors,
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
            tables: Mutex::new(Tables::new(Core::new(&limits))),
            confirmed: Condvar::new(),
            external: Watch::new(&reactor, &ends),
            adding: Mutex::default(),
            buffers: Buffers::default(),
            introspectors: Introspectors::default(),
            monitors: Monitors::default(),
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

    pub(crate) fn locked(&self) -> &Mutex<Tables> {
        &self.tables
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

    /// The introspectors under stock QEMUs.
    pub fn introspectors(&self) -> &Introspectors {
        &self.introspectors
    }

    /// The QMP connections that last, for all who use them.
    pub(crate) fn monitors(&self) -> &Monitors {
        &self.monitors
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
        self.tables().core.policies.set_default(policy);
    }

    /// How many grants and views there are.
    pub fn grant_count(&self) -> (usize, usize) {
        self.tables().core.grants.len()
    }

    /// A page of the VMs whose number is above `after`.
    pub fn list(&self, after: u64) -> Answer {
        let tables = self.tables();
        let mut vms = tables.core.vms.after(after);
        let page: Vec<Arc<Vm>> =
            vms.by_ref().take(PAGE).filter_map(|vm| tables.vms.get(&vm.id).cloned()).collect();
        let more = vms.next().is_some();
        drop(vms);
        drop(tables);
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
            && self.vm(tool).is_none()
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
                let vm = self.vm_with_cid(*cid);
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

    /// Records a new connection.
    pub(crate) fn join(&self, peer: &Arc<Peer>) {
        let mut tables = self.tables();
        tables.core.peer_joined(peer.number(), peer.credentials());
        tables.peers.insert(peer.number(), Arc::clone(peer));
    }

    /// Does what the end of a connection demands: its VM goes, and so do its views.
    pub(crate) fn leave(&self, peer: &Peer, vm: Option<&Vm>) {
        if let Some(vm) = vm {
            self.retire(vm);
        }
        peer.end_channels();
        let now = self.now();
        self.decide(|tables| tables.core.peer_lost(now, peer.number()));
        let left = self.tables().peers.remove(&peer.number());
        drop(left);
    }

    /// Registers a VM for a user. Takes `ram` only then: the caller frees what is not taken.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn register(
        &self,
        registration: Registration,
        ram: &mut Option<Ram>,
        peer: Arc<Peer>,
        by: Credentials,
    ) -> Result<Arc<Vm>, RegisterError> {
        let registration = Arc::new(registration);
        let new = NewVm {
            registration: Arc::clone(&registration),
            layout: ram.as_ref().map(Ram::layout),
            peer: peer.number(),
            vmm: peer.credentials(),
            by,
        };
        let mut tables = self.tables();
        let id = tables.core.register(new)?;
        let vm = Arc::new(Vm::new(id, registration, ram.take(), peer));
        tables.vms.insert(id, Arc::clone(&vm));
        Ok(vm)
    }

    /// Does what the end of a VM demands: its tokens and views end, its sessions end, and the peers
    /// that know it are told.
    pub fn retire(&self, vm: &Vm) {
        let removed = self.decide(|tables| {
            vm.mark_gone();
            tables.core.vm_gone(vm.id());
            tables.vms.remove(&vm.id())
        });
        drop(removed);
        vm.hooks().close();
        if vm.registration().cid.is_some() {
            self.vms().iter().for_each(|target| self.end_hooks(target, vm.id()));
        }
        self.state.forget(vm.id());
        self.audit.gone(vm);
    }

    /// Records that a VM was reset, or has other RAM in its memfd. The peers that know it are told.
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
        self.decide(|tables| tables.core.ram_changed(vm.id(), &layout));
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
        self.decide(|tables| tables.core.ram_changed(vm.id(), &layout));
        Ok(())
    }

    /// The target of a view, and what the view reaches of it; `None` once the view has ended: its
    /// grant was revoked, or its target is gone.
    pub(crate) fn reached(&self, peer: &Peer, view: u64) -> Option<(Arc<Vm>, Scope)> {
        let tables = self.tables();
        let (target, scope) = tables.core.grants.reach(view, peer.number())?;
        Some((Arc::clone(tables.vms.get(&target)?), scope))
    }

    /// How many hooks there are.
    pub fn hook_count(&self) -> usize {
        self.tables().core.hooks.count()
    }

    /// A VM by its number.
    pub fn vm(&self, id: u64) -> Option<Arc<Vm>> {
        self.tables().vms.get(&id).cloned()
    }

    /// All VMs, by ascending number.
    pub(crate) fn vms(&self) -> Vec<Arc<Vm>> {
        let tables = self.tables();
        tables.core.vms.after(0).filter_map(|vm| tables.vms.get(&vm.id).cloned()).collect()
    }

    /// The VM that has a vsock context id.
    pub fn vm_with_cid(&self, cid: u32) -> Option<Arc<Vm>> {
        let tables = self.tables();
        tables.vms.get(&tables.core.vms.with_cid(cid)?.id).cloned()
    }

    /// A VM by its name or its UUID; the target, where an introspector has the same UUID.
    ///
    /// # Errors
    /// Where there is none.
    pub fn find(&self, target: &str) -> Result<Arc<Vm>, Refused> {
        self.find_as(target, |registration| registration.introspectable)
    }

    /// A VM by its name or its UUID; the introspector, where a target has the same UUID.
    ///
    /// # Errors
    /// Where there is none.
    pub(crate) fn find_introspector(&self, name: &str) -> Result<Arc<Vm>, Refused> {
        self.find_as(name, |registration| registration.introspector)
    }

    fn find_as(
        &self,
        name: &str,
        is_meant: impl Fn(&Registration) -> bool,
    ) -> Result<Arc<Vm>, Refused> {
        let tables = self.tables();
        let id = tables.core.vms.find(name, is_meant)?.id;
        tables.vms.get(&id).cloned().ok_or_else(Refused::busy)
    }
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
        let taken = broker.tables().core.hooks.take(who);
        taken.map_err(|error| Refused::new(Refusal::Limit, format!("hooks: {error}")))?;
        Ok(Self { broker: Arc::downgrade(broker), uid: who.uid })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(broker) = self.broker.upgrade() {
            broker.tables().core.hooks.give_back(self.uid);
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

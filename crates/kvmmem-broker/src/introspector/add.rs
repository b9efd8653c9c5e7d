// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Makes an introspector of a QEMU that runs, and undoes that.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Answer, OnSilence, Refusal, Registration, Which};
use kvmmem_qemu::attach::random_uuid;
use kvmmem_qemu::process;
use uuid::Uuid;

use super::ask::{self, AskError, Machine};
use super::find::{self, FindError, Found};
use super::inbox::Inbox;
use super::link::Link;
use super::list::MAX;
use super::monitor::Monitor;
use super::process::Process;
use super::view::View;
use super::{Introspector, State, Traits, events, qmp_events};
use crate::broker::{Broker, Refused};
use crate::registry::RegisterError;
use crate::state::{Entry, Role};

/// Why a QEMU is no introspector.
#[derive(Debug, thiserror::Error)]
enum AddError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error(
        "QEMU has no vsock device, by which a guest asks for views; start it with -device vhost-vsock-pci,guest-cid=N"
    )]
    NoCid,
    #[error(
        "QEMU has no PCI slot for views; start it with root ports whose ids begin with kvmmem, as `kvmmem qemu-args` prints them"
    )]
    NoPlaces,
    #[error("there are {MAX} introspectors under QEMUs already")]
    Full,
    #[error(
        "cannot listen at the vsock port at which guests ask for views; does the host have vsock (modprobe vhost_vsock)?"
    )]
    GuestEndpoint(#[source] io::Error),
    #[error("cannot make what goes with an introspector")]
    Resources(#[source] io::Error),
    #[error("cannot make a UUID")]
    Random(#[source] getrandom::Error),
    #[error(transparent)]
    Register(#[from] RegisterError),
}

impl From<AddError> for Refused {
    fn from(error: AddError) -> Self {
        let refusal = match &error {
            AddError::Register(error) => error.refusal(),
            AddError::Full | AddError::Resources(_) | AddError::Random(_) => Refusal::Limit,
            AddError::Find(_)
            | AddError::Ask(_)
            | AddError::NoCid
            | AddError::NoPlaces
            | AddError::GuestEndpoint(_) => Refusal::Invalid,
        };
        Self::from_error(refusal, &error)
    }
}

impl Broker {
    /// Makes an introspector of a VM that runs under a stock QEMU.
    ///
    /// # Errors
    /// Where the VM cannot be one, or the registry does not take it.
    pub(crate) fn add_introspector(
        self: &Arc<Self>,
        peer: Credentials,
        which: &Which,
        cid: Option<u32>,
        name: Option<String>,
        on_silence: OnSilence,
    ) -> Result<Answer, Refused> {
        self.introspect(peer, which, (cid, name, None), on_silence)
    }

    /// As [`Self::add_introspector`]; a VM that had a UUID has it again.
    pub(crate) fn introspect(
        self: &Arc<Self>,
        peer: Credentials,
        which: &Which,
        (cid, name, uuid): (Option<u32>, Option<String>, Option<Uuid>),
        on_silence: OnSilence,
    ) -> Result<Answer, Refused> {
        let slot = self.introspectors().reserve().ok_or(AddError::Full)?;
        let Found { process, qmp, identity } = find::find(which).map_err(AddError::from)?;
        let socket = qmp.path().to_owned();
        let monitor = Monitor::start(qmp, identity).map_err(AddError::Resources)?;
        let added = self.add_found(process, &monitor, (cid, name, uuid), on_silence);
        let (introspector, places) = added.inspect_err(|_| monitor.stop())?;
        let vm = Arc::clone(introspector.link.vm());
        self.audit().added_introspector(&vm, on_silence, peer);
        let broker = Arc::downgrade(self);
        let ended = move |vm| {
            if let Some(broker) = broker.upgrade() {
                broker.close_introspector(vm);
            }
        };
        let pidfd = introspector.process.pidfd().try_clone_to_owned();
        let watched =
            pidfd.and_then(|pidfd| self.introspectors().insert(&introspector, slot, pidfd, ended));
        if let Err(error) = watched {
            introspector.close();
            return Err(AddError::Resources(error).into());
        }
        let Traits { cid, has_offset, .. } = introspector.traits;
        let role = Role::Introspector { cid, on_silence };
        self.state().remember(&vm, Entry::of(&vm, Some(socket), role));
        Ok(Answer::IntrospectorAdded { target: vm.info(), places, has_offset })
    }

    fn add_found(
        self: &Arc<Self>,
        process: process::Process,
        monitor: &Arc<Monitor>,
        (cid, name, uuid): (Option<u32>, Option<String>, Option<Uuid>),
        on_silence: OnSilence,
    ) -> Result<(Arc<Introspector>, u32), AddError> {
        let machine = Machine::of(monitor)?;
        let cid = cid.or(machine.cid).ok_or(AddError::NoCid)?;
        let places = ask::places(monitor)?.count;
        if places == 0 {
            return Err(AddError::NoPlaces);
        }
        let left_over = ask::left_over(monitor)?;
        self.introspectors().open_guest_endpoint(self).map_err(AddError::GuestEndpoint)?;
        let pid = process.pid();
        let registration = Registration {
            name: name.or(machine.name).unwrap_or_else(|| format!("qemu-{pid}")),
            uuid: machine.uuid.or(uuid).map_or_else(random_uuid, Ok).map_err(AddError::Random)?,
            vcpus: machine.vcpus,
            start_time_ms: process.start_time_ms().unwrap_or(0),
            vcpu_questions: false,
            cid: Some(cid),
            introspectable: false,
            introspector: true,
            regions: Vec::new(),
        };
        let uid = process.uid().map_err(|error| AddError::Find(FindError::Attach(error.into())))?;
        let (name, session) = (registration.name.clone(), session()?);
        let inbox = Arc::new(Inbox::new().map_err(|error| AddError::Resources(error.into()))?);
        let link = Link::register(self, registration, Credentials { pid, uid }, &inbox)?;
        let (vm, has_offset) = (link.vm().id(), machine.has_offset);
        let traits = Traits { vm, name, cid, on_silence, has_offset, session };
        let views = left_over.map(|plug| Arc::new(View::left_over(plug))).into_iter().collect();
        let introspector = Arc::new_cyclic(|me| Introspector {
            me: Weak::clone(me),
            broker: Arc::downgrade(self),
            link,
            inbox,
            monitor: Arc::clone(monitor),
            process: Process::new(process.into_pidfd()),
            traits,
            state: Mutex::new(State { views, ..State::default() }),
        });
        events::start(&introspector).map_err(AddError::Resources)?;
        qmp_events::start(&introspector).map_err(AddError::Resources)?;
        // What is left over is tried at once.
        monitor.nudge();
        Ok((introspector, u32::try_from(places).unwrap_or(u32::MAX)))
    }

    /// Takes an introspector out that was added; its views end. The VM itself runs on.
    ///
    /// # Errors
    /// Where there is no such introspector.
    pub(crate) fn remove_introspector(&self, name: &str) -> Result<Answer, Refused> {
        let vm = self.find_introspector(name)?;
        if !self.close_introspector(vm.id()) {
            let message = format!("{name:?} was not added as an introspector");
            return Err(Refused::new(Refusal::Denied, message));
        }
        Ok(Answer::Done)
    }

    /// Takes all introspectors out that were added, all at the same time, and waits for it until
    /// the deadline.
    pub(crate) fn remove_introspectors(&self, deadline: Instant) {
        let (done, are_done) = mpsc::channel::<()>();
        for introspector in self.introspectors().remove_all() {
            let (closed, done) = (Arc::clone(&introspector), done.clone());
            let close = move || {
                closed.close();
                drop(done);
            };
            if std::thread::Builder::new().name("introspector-end".into()).spawn(close).is_err() {
                introspector.close();
            }
        }
        drop(done);
        self.introspectors().close_guest_endpoint();
        // Nothing is sent: the channel closes when the last one is done.
        let left = deadline.saturating_duration_since(Instant::now());
        if are_done.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("not every introspector released its views in time");
        }
    }

    pub(super) fn close_introspector(&self, vm: u64) -> bool {
        let introspector = self.introspectors().remove(vm);
        if let Some(introspector) = &introspector {
            introspector.close();
        }
        introspector.is_some()
    }
}

fn session() -> Result<String, AddError> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(AddError::Random)?;
    Ok(format!("{:08x}", u32::from_le_bytes(bytes)))
}

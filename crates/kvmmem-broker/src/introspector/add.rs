// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Makes an introspector of a QEMU that runs, and undoes that.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Answer, IntrospectorRequest, NewIntrospector, Refusal, VmIdentity};
use kvmmem_qemu::attach::random_uuid;
use kvmmem_qemu::find::{self, FindError};
use kvmmem_qemu::windows::machine::{self, Machine, MachineError};
use uuid::Uuid;

use super::handle::{Introspector, State, Traits, Trust};
use super::inbox::Inbox;
use super::link::Link;
use super::list::MAX;
use super::qemu::Qemu;
use super::retired::RetiredPorts;
use super::thread;
use super::token_list::TokenViews;
use super::view::View;
use crate::audit::Event;
use crate::core::call_error::CallError;
use crate::core::vms::RegisterError;
use crate::service::Service;
use crate::state::entry::{Entry, Role};

/// How long removing an introspector may take; it ends all the same.
const CLOSE_LIMIT: Duration = Duration::from_secs(6);

/// Why a QEMU is no introspector.
#[derive(Debug, thiserror::Error)]
enum AddError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(
        "QEMU has no vsock device, by which a guest asks for views; start it with -device vhost-vsock-pci,guest-cid=N"
    )]
    NoCid,
    #[error(
        "QEMU has no PCI slot for views; start it with root ports whose ids begin with kvmmem, as `kvmmem qemu-args` prints them"
    )]
    NoSlots,
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

impl From<AddError> for CallError {
    fn from(error: AddError) -> Self {
        let refusal = match &error {
            AddError::Register(error) => error.refusal(),
            AddError::Full | AddError::Resources(_) | AddError::Random(_) => Refusal::Limit,
            AddError::Find(_)
            | AddError::Machine(_)
            | AddError::NoCid
            | AddError::NoSlots
            | AddError::GuestEndpoint(_) => Refusal::Invalid,
        };
        Self::from_error(refusal, &error)
    }
}

impl Service {
    /// Makes an introspector of a VM that runs under a stock QEMU.
    ///
    /// # Errors
    /// Where the VM cannot be one, or the registry does not take it.
    pub(crate) fn add_introspector(
        self: &Arc<Self>,
        peer: Credentials,
        request: &IntrospectorRequest,
    ) -> Result<Answer, CallError> {
        self.introspect(peer, request, None)
    }

    /// As [`Self::add_introspector`]; a VM that had a UUID has it again.
    pub(crate) fn introspect(
        self: &Arc<Self>,
        peer: Credentials,
        request: &IntrospectorRequest,
        uuid: Option<Uuid>,
    ) -> Result<Answer, CallError> {
        let slot = self.introspectors().reserve().ok_or(AddError::Full)?;
        let found = find::find(&request.which, &|path| self.monitors().connect(path));
        let found = found.map_err(AddError::from)?;
        let socket = found.qmp.path().to_owned();
        let (introspector, slot_count) = self.add_found(found, request, uuid)?;
        let vm = Arc::clone(introspector.link.vm());
        let Trust { on_silence, is_trusted } = introspector.traits.trust;
        let added = Event::AddedIntrospector { vm: &vm, on_silence, is_trusted, by: peer };
        self.broker().audit().write(added);
        let Traits { cid, has_offset, .. } = introspector.traits;
        let role = Role::Introspector { cid, on_silence, trusted: is_trusted };
        self.broker().state().remember(&vm, Entry::of(&vm, Some(socket), role));
        self.introspectors().insert(&introspector, slot);
        if let Err(error) = thread::start(&introspector, self.introspectors(), self.services()) {
            self.introspectors().end(&introspector);
            return Err(AddError::Resources(error).into());
        }
        let target = vm.info();
        Ok(Answer::IntrospectorAdded(NewIntrospector { target, slot_count, has_offset }))
    }

    fn add_found(
        self: &Arc<Self>,
        find::Qemu { process, mut qmp, identity }: find::Qemu,
        request: &IntrospectorRequest,
        uuid: Option<Uuid>,
    ) -> Result<(Arc<Introspector>, u32), AddError> {
        let machine = Machine::of(&mut qmp)?;
        let cid = request.cid.or(machine.cid).ok_or(AddError::NoCid)?;
        let slot_count = machine::slots(&mut qmp)?.count;
        if slot_count == 0 {
            return Err(AddError::NoSlots);
        }
        let left_over = machine::left_over(&mut qmp)?;
        let marks = machine::marks(&mut qmp)?;
        self.open_guest_endpoint().map_err(AddError::GuestEndpoint)?;
        let pid = process.pid();
        let registered = VmIdentity {
            name: request.name.clone().or(machine.name).unwrap_or_else(|| format!("qemu-{pid}")),
            uuid: machine.uuid.or(uuid).map_or_else(random_uuid, Ok).map_err(AddError::Random)?,
            vcpus: machine.vcpus,
            start_time_ms: process.start_time_ms().unwrap_or(0),
            cid: Some(cid),
            introspectable: false,
            introspector: true,
        };
        let uid = process.uid().map_err(|error| AddError::Find(error.into()))?;
        let (name, session) = (registered.name.clone(), session()?);
        let inbox = Arc::new(Inbox::new().map_err(|error| AddError::Resources(error.into()))?);
        let link = Link::register(self.broker(), registered, Credentials { pid, uid }, &inbox)?;
        let (vm, has_offset) = (link.vm().id(), machine.has_offset);
        let trust = Trust { on_silence: request.on_silence, is_trusted: request.trusted };
        let traits = Traits { vm, name, cid, trust, has_offset, session };
        let views = left_over.map(|plug| Arc::new(View::left_over(plug))).into_iter().collect();
        let qemu = Qemu { path: qmp.path().to_owned(), listener: qmp.listener(), identity };
        let monitor = self.monitors().of(&qemu.path, Some(qmp));
        let retired = RetiredPorts::left_over(marks, monitor.counts());
        let introspector = Arc::new(Introspector {
            broker: Arc::downgrade(self.broker()),
            link,
            inbox,
            monitor,
            qemu,
            process,
            traits,
            state: Mutex::new(State { views, retired, ..State::default() }),
            token_views: TokenViews::default(),
            workers: self.services().clone(),
            ended: Condvar::new(),
        });
        Ok((introspector, u32::try_from(slot_count).unwrap_or(u32::MAX)))
    }

    /// Takes an introspector out that was added; its views end. The VM itself runs on.
    pub(crate) fn remove_introspector(&self, name: &str) -> Result<Answer, CallError> {
        let vm = self.broker().find_introspector(name)?;
        let introspector = self.introspectors().get(vm.id()).ok_or_else(|| {
            let message = format!("{name:?} was not added as an introspector");
            CallError::new(Refusal::Denied, message)
        })?;
        introspector.close();
        introspector.wait_ended(Instant::now() + CLOSE_LIMIT);
        Ok(Answer::Done)
    }

    /// Takes all introspectors out that were added, all at the same time, and waits for it until
    /// the deadline.
    pub(crate) fn remove_introspectors(&self, deadline: Instant) {
        let all = self.introspectors().all();
        all.iter().for_each(|introspector| introspector.close());
        self.guest_endpoint().close();
        if !all.iter().all(|introspector| introspector.wait_ended(deadline)) {
            tracing::warn!("not every introspector released its views in time");
        }
    }
}

fn session() -> Result<String, AddError> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(AddError::Random)?;
    Ok(format!("{:08x}", u32::from_le_bytes(bytes)))
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An introspector as the broker's tables have it: a registered VM, whose peer is in this process.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Answer, Call, Caller, Refusal, ViewCounters, VmIdentity};

use super::inbox::Inbox;
use super::view::AttachAnswer;
use crate::audit::Event;
use crate::broker::Broker;
use crate::calls::Outcome;
use crate::core::call_error::CallError;
use crate::core::vms::RegisterError;
use crate::peer::{Peer, Viewer};
use crate::registry::Vm;
use crate::sync::lock;

/// How long a token that opens nothing delays the introspector's next one: guests may guess.
const PAUSE: Duration = Duration::from_millis(1);

/// The registration, until [`Link::close`] or drop.
pub(super) struct Link {
    broker: Weak<Broker>,
    peer: Arc<Peer>,
    vm: Arc<Vm>,
    /// Held while a token is used.
    attaching: Mutex<()>,
    is_closed: AtomicBool,
}

impl Link {
    /// Registers an introspector; `inbox` gets what the broker pushes to it.
    pub(super) fn register(
        broker: &Arc<Broker>,
        identity: VmIdentity,
        credentials: Credentials,
        inbox: &Arc<Inbox>,
    ) -> Result<Self, RegisterError> {
        let peer = Arc::new(Peer::within(Arc::clone(inbox) as Arc<dyn Viewer>, credentials));
        let by = Arc::clone(&peer);
        broker.join(&peer);
        let registered = broker.register(identity, &mut None, by, credentials);
        let vm = registered.inspect_err(|_| broker.leave(&peer, None))?;
        broker.audit().write(Event::Registered(&vm));
        let (attaching, is_closed) = (Mutex::default(), AtomicBool::new(false));
        Ok(Self { broker: Arc::downgrade(broker), peer, vm, attaching, is_closed })
    }

    /// The introspector in the registry.
    pub(super) fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Uses a token to open a view, on behalf of a process of the guest.
    ///
    /// What is pushed about the view before the caller has listed it finds nothing there: the
    /// caller looks at [`Self::target_of`] then. A view that comes to nothing is reported by
    /// [`Self::detached`].
    pub(super) fn attach(
        &self,
        token: &Token,
        caller: &Caller,
        read_only: bool,
    ) -> Result<AttachAnswer, CallError> {
        let ended = || CallError::new(Refusal::Busy, "the broker ends");
        let broker = self.broker.upgrade().ok_or_else(ended)?;
        let _attaching = lock(&self.attaching);
        let (token, caller) = (token.clone(), caller.clone());
        let call = Call::Attach { token, caller, read_only, reaching: Vec::new() };
        match broker.handle(&self.peer, Some(&self.vm), call) {
            Ok(Outcome::Answer(Answer::Attached { view, grant, target, scope }, _)) => {
                Ok(AttachAnswer { view, grant, target, scope })
            }
            // There is no other answer to a VM.
            Ok(_) => Err(ended()),
            Err(refused) => {
                let (peer, vm, reason) = (&self.peer, Some(&*self.vm), &refused.message);
                broker.audit().write(Event::Refused { peer, vm, reason });
                if refused.refusal == Refusal::Unknown {
                    std::thread::sleep(PAUSE);
                }
                Err(refused)
            }
        }
    }

    /// The target of a view; `None` once the view has ended: its grant was revoked, its target is
    /// gone, or this is closed.
    pub(super) fn target_of(&self, view: u64) -> Option<Arc<Vm>> {
        self.broker.upgrade()?.reached(&self.peer, view).map(|(vm, _)| vm)
    }

    /// A target by its number.
    pub(super) fn target(&self, id: u64) -> Option<Arc<Vm>> {
        self.broker.upgrade()?.vm(id)
    }

    /// Reports that the guest has used a grant's token for a page.
    pub(super) fn used(&self, grant: u64) {
        if let Some(broker) = self.broker.upgrade() {
            // It is refused where the target is gone.
            let _ = broker.handle(&self.peer, Some(&self.vm), Call::Used { grant });
        }
    }

    /// A grant's target, if the guest has mapped a page by the grant.
    pub(super) fn mapped(&self, grant: u64) -> Option<u64> {
        let broker = self.broker.upgrade()?;
        let tables = broker.tables();
        tables.core.grants.mapped(grant, self.peer.number())
    }

    /// Reports that a view is closed. One that has ended is the broker's no more.
    pub(super) fn detached(&self, view: u64) {
        if let (Some(broker), Some(_)) = (self.broker.upgrade(), self.target_of(view)) {
            // It may end at this moment, and is closed then.
            let call = Call::Detached { view, counters: ViewCounters::default() };
            let _ = broker.handle(&self.peer, Some(&self.vm), call);
        }
    }

    /// Confirms that a revoked grant is of no use to the guest any more.
    pub(super) fn revoked(&self, grant: u64) {
        if let Some(broker) = self.broker.upgrade() {
            // It is refused only where the introspector has ended.
            let _ = broker.handle(&self.peer, Some(&self.vm), Call::RevokedDone { grant });
        }
    }

    /// Ends the registration, once.
    pub(super) fn close(&self) {
        if !self.is_closed.swap(true, Ordering::AcqRel)
            && let Some(broker) = self.broker.upgrade()
        {
            broker.leave(&self.peer, Some(&self.vm));
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("vm", &self.vm.id()).finish_non_exhaustive()
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The introspectors that the broker has, and the guest endpoint, where their guests' tools
//! connect.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use kvmmem_proto::guest::GUEST_PORT;

use super::Introspector;
use super::view::lock;

use crate::broker::Broker;
use crate::external::watch::{Watch, Watched};
use crate::guest_endpoint::GuestEndpoint;
use crate::reactor::Reactor;
use crate::workers::Workers;

/// The most introspectors: each has three threads, and one more while views end.
pub(super) const MAX: usize = 64;

/// The introspectors, by the broker's numbers for their VMs.
#[derive(Debug)]
pub struct Introspectors {
    list: Mutex<BTreeMap<u64, (Arc<Introspector>, Slot)>>,
    /// Of each slot that is taken there is a clone.
    slots: Mutex<Arc<()>>,
    /// Their QEMUs.
    watch: Watch,
    endpoint: Mutex<GuestEndpointState>,
}

/// One of the [`MAX`] introspectors that there may be: taken before a QEMU is asked anything, and
/// kept with its entry.
#[derive(Debug)]
pub(super) struct Slot(#[allow(dead_code, reason = "counted by its clones")] Arc<()>);

#[derive(Debug)]
enum GuestEndpointState {
    /// Opened at this port when the first introspector is added; `None` for never.
    Closed(Option<u32>),
    Open(#[allow(dead_code, reason = "kept until it is dropped")] GuestEndpoint),
}

impl Default for GuestEndpointState {
    fn default() -> Self {
        Self::Closed(Some(GUEST_PORT))
    }
}

impl Introspectors {
    /// None.
    pub(crate) fn new(reactor: &Reactor, workers: &Workers) -> Self {
        Self {
            list: Mutex::default(),
            slots: Mutex::default(),
            watch: Watch::new(reactor, workers),
            endpoint: Mutex::default(),
        }
    }

    /// The one with a vsock context id: the last that was added, where one before is still being
    /// taken out.
    pub fn by_cid(&self, cid: u32) -> Option<Arc<Introspector>> {
        let list = lock(&self.list);
        list.values()
            .rev()
            .map(|(introspector, _)| introspector)
            .find(|it| it.cid() == cid)
            .cloned()
    }

    /// Says at which vsock port the guest endpoint listens, `None` for never. Has no effect on an
    /// endpoint that is open.
    pub fn set_guest_port(&self, port: Option<u32>) {
        let mut endpoint = lock(&self.endpoint);
        if matches!(*endpoint, GuestEndpointState::Closed(_)) {
            *endpoint = GuestEndpointState::Closed(port);
        }
    }

    /// Opens the guest endpoint unless it is open.
    pub(super) fn open_guest_endpoint(&self, broker: &Arc<Broker>) -> io::Result<()> {
        let mut endpoint = lock(&self.endpoint);
        if let GuestEndpointState::Closed(Some(port)) = *endpoint {
            *endpoint = GuestEndpointState::Open(GuestEndpoint::start(broker, port)?);
        }
        Ok(())
    }

    /// Closes the guest endpoint for good, and with it all its connections and views.
    pub(crate) fn close_guest_endpoint(&self) {
        let endpoint =
            std::mem::replace(&mut *lock(&self.endpoint), GuestEndpointState::Closed(None));
        drop(endpoint);
    }

    /// Takes a slot, which is free again when it is dropped; `None` where all are taken.
    pub(super) fn reserve(&self) -> Option<Slot> {
        let slots = lock(&self.slots);
        (Arc::strong_count(&slots) <= MAX).then(|| Slot(Arc::clone(&slots)))
    }

    /// Adds one; `ended` is called when a QEMU has ended, once, with the VM's number.
    pub(super) fn insert(
        &self,
        introspector: &Arc<Introspector>,
        slot: Slot,
        pidfd: OwnedFd,
        ended: impl Fn(u64) + Send + Sync + 'static,
    ) -> io::Result<()> {
        let vm = introspector.traits.vm;
        lock(&self.list).insert(vm, (Arc::clone(introspector), slot));
        let watched = Watched { vm, pidfd: Arc::new(pidfd), monitor: None };
        let ended =
            move |watched: Vec<Watched>| watched.iter().for_each(|watched| ended(watched.vm));
        self.watch.add(watched, ended).inspect_err(|_| {
            lock(&self.list).remove(&vm);
        })
    }

    pub(super) fn remove(&self, vm: u64) -> Option<Arc<Introspector>> {
        self.watch.remove(vm);
        lock(&self.list).remove(&vm).map(|(introspector, _)| introspector)
    }

    /// Removes all.
    pub(super) fn remove_all(&self) -> Vec<Arc<Introspector>> {
        let removed = std::mem::take(&mut *lock(&self.list));
        removed
            .into_iter()
            .map(|(vm, (introspector, _))| {
                self.watch.remove(vm);
                introspector
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use kvmmem_proto::credentials::Credentials;
    use kvmmem_proto::message::Which;
    use kvmmem_proto::message::{OnSilence, Refusal};

    use super::*;

    #[test]
    fn those_that_are_being_added_count() {
        let broker = Arc::new(Broker::default());
        let add = || {
            let peer = Credentials { pid: 1, uid: 0 };
            broker
                .add_introspector(peer, &Which::Pid(0), None, None, OnSilence::Report)
                .unwrap_err()
        };
        let mut slots: Vec<Slot> =
            (0..MAX).map(|_| broker.introspectors().reserve().unwrap()).collect();
        let refused = add();
        assert_eq!(refused.refusal, Refusal::Limit, "{}", refused.message);
        slots.pop();
        let refused = add();
        assert_eq!(refused.refusal, Refusal::Invalid, "{}", refused.message);
    }
}

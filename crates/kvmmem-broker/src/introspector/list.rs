// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The introspectors that the broker has, and the guest endpoint, where their guests' tools
//! connect.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use kvmmem_proto::guest::GUEST_PORT;

use super::Introspector;
use super::view::lock;

use crate::broker::Broker;
use crate::guest_endpoint::GuestEndpoint;

/// The most introspectors: each has a thread.
pub(super) const MAX: usize = 64;

/// The introspectors, by the broker's numbers for their VMs.
#[derive(Debug, Default)]
pub struct Introspectors {
    list: Mutex<BTreeMap<u64, (Arc<Introspector>, Slot)>>,
    /// Of each slot that is taken there is a clone.
    slots: Mutex<Arc<()>>,
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

    /// Adds one, before its thread starts, which removes it.
    pub(super) fn insert(&self, introspector: &Arc<Introspector>, slot: Slot) {
        lock(&self.list).insert(introspector.traits.vm, (Arc::clone(introspector), slot));
    }

    /// One by the broker's number for its VM.
    pub(super) fn get(&self, vm: u64) -> Option<Arc<Introspector>> {
        lock(&self.list).get(&vm).map(|(introspector, _)| Arc::clone(introspector))
    }

    pub(super) fn remove(&self, vm: u64) {
        // It may be the last one of the broker's, and is dropped without the lock.
        let removed = lock(&self.list).remove(&vm);
        drop(removed);
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<Arc<Introspector>> {
        lock(&self.list).values().map(|(introspector, _)| Arc::clone(introspector)).collect()
    }
}

impl Drop for Introspectors {
    fn drop(&mut self) {
        self.all().iter().for_each(|introspector| introspector.close());
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

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The introspectors that the broker has.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::handle::Introspector;
use crate::sync::lock;

/// The most introspectors: each has a thread.
pub(crate) const MAX: usize = 64;

/// The introspectors, by the broker's numbers for their VMs.
#[derive(Debug, Default)]
pub(crate) struct Introspectors {
    list: Mutex<BTreeMap<u64, (Arc<Introspector>, Slot)>>,
    /// Of each slot that is taken there is a clone.
    slots: Mutex<Arc<()>>,
}

/// One of the [`MAX`] introspectors that there may be: taken before a QEMU is asked anything, and
/// kept with its entry.
#[derive(Debug)]
pub(super) struct Slot(#[allow(dead_code, reason = "counted by its clones")] Arc<()>);

impl Introspectors {
    /// The one with a vsock context id: the last that was added, where one before is still being
    /// taken out.
    pub(crate) fn by_cid(&self, cid: u32) -> Option<Arc<Introspector>> {
        let list = lock(&self.list);
        list.values()
            .rev()
            .map(|(introspector, _)| introspector)
            .find(|it| it.cid() == cid)
            .cloned()
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
    pub(crate) fn get(&self, vm: u64) -> Option<Arc<Introspector>> {
        lock(&self.list).get(&vm).map(|(introspector, _)| Arc::clone(introspector))
    }

    /// Ends and removes one, whose thread has ended or never begun.
    pub(super) fn end(&self, introspector: &Introspector) {
        // It may be the last one of the broker's, and is dropped without the lock.
        let removed = lock(&self.list).remove(&introspector.traits.vm);
        drop(removed);
        introspector.end();
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
    use kvmmem_proto::message::{IntrospectorRequest, OnSilence, Refusal, Which};

    use super::*;
    use crate::service::Service;

    #[test]
    fn those_that_are_being_added_count() {
        let service = Arc::<Service>::default();
        let add = || {
            let peer = Credentials { pid: 1, uid: 0 };
            let (which, on_silence) = (Which::Pid(0), OnSilence::Report);
            let (cid, name, trusted) = (None, None, false);
            let request = IntrospectorRequest { which, cid, name, on_silence, trusted };
            service.add_introspector(peer, &request).unwrap_err()
        };
        let mut slots: Vec<Slot> =
            (0..MAX).map(|_| service.introspectors().reserve().unwrap()).collect();
        let refused = add();
        assert_eq!(refused.refusal, Refusal::Limit, "{}", refused.message);
        slots.pop();
        let refused = add();
        assert_eq!(refused.refusal, Refusal::Invalid, "{}", refused.message);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The introspectors that the broker has, and the door by which their guests come in.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use kvmmem_proto::guest::GUEST_PORT;

use super::Introspector;
use super::view::lock;

use crate::broker::Broker;
use crate::door::Door;
use crate::external::watch::{Watch, Watched};

/// The most introspectors: each has five threads, and one more while views end.
pub(super) const MAX: usize = 64;

/// The introspectors, by the broker's numbers for their VMs.
#[derive(Debug, Default)]
pub struct Introspectors {
    list: Mutex<BTreeMap<u64, (Arc<Introspector>, Slot)>>,
    /// Of each slot that is taken there is a clone.
    slots: Mutex<Arc<()>>,
    /// Their QEMUs.
    watch: Watch,
    door: Mutex<Doorway>,
}

/// One of the [`MAX`] introspectors that there may be: taken before a QEMU is asked anything, and kept with its entry.
#[derive(Debug)]
pub(super) struct Slot(#[allow(dead_code, reason = "counted by its clones")] Arc<()>);

#[derive(Debug)]
enum Doorway {
    /// Opened at this port when the first introspector is added; `None` for never.
    Shut(Option<u32>),
    Open(#[allow(dead_code, reason = "kept until it is dropped")] Door),
}

impl Default for Doorway {
    fn default() -> Self {
        Self::Shut(Some(GUEST_PORT))
    }
}

impl Introspectors {
    /// The one with a vsock context id: the last that was added, where one before is still being taken out.
    pub fn by_cid(&self, cid: u32) -> Option<Arc<Introspector>> {
        let list = lock(&self.list);
        list.values().rev().map(|(introspector, _)| introspector).find(|it| it.cid() == cid).cloned()
    }

    /// Says at which vsock port guests knock, `None` for no door at all. Counts for a door that is not open yet.
    pub fn set_door(&self, port: Option<u32>) {
        let mut door = lock(&self.door);
        if matches!(*door, Doorway::Shut(_)) {
            *door = Doorway::Shut(port);
        }
    }

    /// Opens the door, unless it is open.
    pub(super) fn open_door(&self, broker: &Arc<Broker>) -> io::Result<()> {
        let mut door = lock(&self.door);
        if let Doorway::Shut(Some(port)) = *door {
            *door = Doorway::Open(Door::start(broker, port)?);
        }
        Ok(())
    }

    /// Shuts the door for good; whoever is inside leaves, with a view or without.
    pub(super) fn shut_door(&self) {
        let door = std::mem::replace(&mut *lock(&self.door), Doorway::Shut(None));
        drop(door);
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
        ended: impl Fn(u64) + Send + 'static,
    ) -> io::Result<()> {
        let vm = introspector.traits.vm;
        lock(&self.list).insert(vm, (Arc::clone(introspector), slot));
        let watched = Watched { vm, pidfd: Arc::new(pidfd), monitor: None };
        let ended = move |watched: Vec<Watched>| watched.iter().for_each(|watched| ended(watched.vm));
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
            broker.add_introspector(peer, &Which::Pid(0), None, None, OnSilence::Report).unwrap_err()
        };
        let mut slots: Vec<Slot> = (0..MAX).map(|_| broker.introspectors().reserve().unwrap()).collect();
        let refused = add();
        assert_eq!(refused.refusal, Refusal::Limit, "{}", refused.message);
        slots.pop();
        let refused = add();
        assert_eq!(refused.refusal, Refusal::Invalid, "{}", refused.message);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The core under its lock, with the handles that go with its numbers, and what is done once the
//! lock is released.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};

use crate::broker::Broker;
use crate::core::Core;
use crate::core::effect::{Effect, Push};
use crate::core::grants::View;
use crate::peer::Peer;
use crate::registry::Vm;

/// What the broker's one lock guards. It is never held over a system call.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) core: Core,
    /// The VMs that the core has, by number.
    pub(crate) vms: HashMap<u64, Arc<Vm>>,
    /// The connections that the core has, by number.
    pub(crate) peers: HashMap<u64, Arc<Peer>>,
}

/// What is left to do without the lock.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Pending {
    /// Something waits in their outboxes.
    peers: Vec<Arc<Peer>>,
    closed: Vec<(View, Option<Arc<Peer>>, &'static str)>,
    is_confirmed: bool,
}

impl Tables {
    pub(crate) fn new(core: Core) -> Self {
        Self { core, vms: HashMap::new(), peers: HashMap::new() }
    }

    /// Fills the outboxes, in the order of the effects.
    fn settle(&mut self) -> Pending {
        let mut pending = Pending::default();
        for effect in self.core.take_effects() {
            match effect {
                Effect::Push { peer, push } => {
                    let Some(peer) = self.peers.get(&peer) else { continue };
                    let ram = match push {
                        Push::Target { target, .. } => {
                            self.vms.get(&target).and_then(|vm| vm.ram())
                        }
                        _ => None,
                    };
                    peer.outbox().put((push, ram.cloned()));
                    pending.peers.push(Arc::clone(peer));
                }
                Effect::Closed { view, reason } => {
                    let peer = self.peers.get(&view.peer).cloned();
                    pending.closed.push((view, peer, reason));
                }
                Effect::Confirmed => pending.is_confirmed = true,
            }
        }
        pending
    }
}

impl Broker {
    pub(crate) fn tables(&self) -> MutexGuard<'_, Tables> {
        self.locked().lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the core decide something, and performs what that demands.
    pub(crate) fn decide<T>(&self, operate: impl FnOnce(&mut Tables) -> T) -> T {
        let (result, pending) = self.decide_only(operate);
        self.perform(pending);
        result
    }

    /// Has the core decide something. The caller performs what that demands.
    pub(crate) fn decide_only<T>(&self, operate: impl FnOnce(&mut Tables) -> T) -> (T, Pending) {
        let mut tables = self.tables();
        let result = operate(&mut tables);
        let pending = tables.settle();
        (result, pending)
    }

    pub(crate) fn perform(&self, pending: Pending) {
        if pending.is_confirmed {
            self.confirmed().notify_all();
        }
        for peer in pending.peers {
            peer.flush();
        }
        for (view, peer, reason) in pending.closed {
            self.audit().detached(&view, peer.as_deref(), reason);
        }
    }
}

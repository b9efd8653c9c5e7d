// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The core under its lock, with the handles that go with its numbers, and what is done once the
//! lock is released.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

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
    pub(crate) vms: BTreeMap<u64, Arc<Vm>>,
    /// The connections that the core has, by number.
    pub(crate) peers: HashMap<u64, Arc<Peer>>,
}

/// What is left to do without the lock.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Pending {
    /// Something waits in their outboxes.
    pub(crate) peers: Vec<Arc<Peer>>,
    pub(crate) closed: Vec<(View, Option<Arc<Peer>>, &'static str)>,
    pub(crate) is_confirmed: bool,
}

impl Tables {
    pub(crate) fn new(core: Core) -> Self {
        Self { core, vms: BTreeMap::new(), peers: HashMap::new() }
    }

    /// Fills the outboxes, in the order of the effects.
    pub(crate) fn settle(&mut self) -> Pending {
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
                    peer.outbox().put((push, ram));
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

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The connections that are served.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::core::limits::Limits;
use crate::core::quota::{Exceeded, Quota};
use crate::peer::Peer;
use crate::service::Service;

/// How long the end of all connections is waited for.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) service: Arc<Service>,
    connections: Mutex<Connections>,
    ended: Condvar,
}

#[derive(Debug)]
struct Connections {
    peers: Vec<Arc<Peer>>,
    quota: Quota,
}

impl Shared {
    pub(super) fn new(limits: Limits) -> Self {
        let connections = Connections { peers: Vec::new(), quota: Quota::new(limits.connections) };
        Self {
            service: Arc::new(Service::new(limits)),
            connections: Mutex::new(connections),
            ended: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all connections have ended; returns how many have not.
    pub(super) fn wait_for_peers(&self, limit: Duration) -> usize {
        let are_there = |connections: &mut Connections| !connections.peers.is_empty();
        let waited = self.ended.wait_timeout_while(self.lock(), limit, are_there);
        waited.unwrap_or_else(PoisonError::into_inner).0.peers.len()
    }

    /// Ends all connections, and with them the sessions, and waits for it.
    pub(super) fn end(&self) {
        let deadline = Instant::now() + SHUTDOWN_LIMIT;
        let broker = self.service.broker();
        broker.state().close();
        self.service.remove_introspectors(deadline);
        self.service.remove_external();
        for peer in &self.lock().peers {
            peer.shut_down();
        }
        let left = self.wait_for_peers(SHUTDOWN_LIMIT);
        let hooks = broker.wait_for_hooks(deadline);
        if left + hooks > 0 {
            tracing::warn!(connections = left, hooks, "not everything ended in time");
        }
    }
}

/// A connection's place among those that there may be, given back on drop.
pub(super) struct Place {
    pub(super) shared: Arc<Shared>,
    pub(super) peer: Arc<Peer>,
}

impl Place {
    pub(super) fn take(shared: &Arc<Shared>, peer: &Arc<Peer>) -> Result<Self, Exceeded> {
        let mut connections = shared.lock();
        connections.quota.take(peer.credentials())?;
        connections.peers.push(Arc::clone(peer));
        Ok(Self { shared: Arc::clone(shared), peer: Arc::clone(peer) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = self.shared.lock();
        connections.peers.retain(|peer| !Arc::ptr_eq(peer, &self.peer));
        connections.quota.give_back(self.peer.credentials().uid);
        drop(connections);
        self.shared.ended.notify_all();
    }
}

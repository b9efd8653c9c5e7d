// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The connections that are served.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::core::limits::Limits;
use crate::core::quota::{Quota, QuotaError};
use crate::peer::Peer;
use crate::service::Service;
use crate::sync::{lock, wait_while};

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
    /// By number.
    peers: BTreeMap<u64, Arc<Peer>>,
    quota: Quota,
}

impl Shared {
    pub(super) fn new(limits: Limits) -> Self {
        let connections =
            Connections { peers: BTreeMap::new(), quota: Quota::new(limits.connections) };
        Self {
            service: Arc::new(Service::new(limits)),
            connections: Mutex::new(connections),
            ended: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        lock(&self.connections)
    }

    /// Waits until all connections have ended; returns how many have not.
    pub(super) fn wait_for_peers(&self, deadline: Instant) -> usize {
        wait_while(&self.ended, self.lock(), deadline, |all| !all.peers.is_empty()).peers.len()
    }

    /// Ends all connections, and with them the sessions, and waits for it.
    pub(super) fn end(&self) {
        let deadline = Instant::now() + SHUTDOWN_LIMIT;
        let broker = self.service.broker();
        broker.state().close();
        self.service.remove_introspectors(deadline);
        self.service.remove_external();
        for peer in self.lock().peers.values() {
            peer.shut_down();
        }
        let left = self.wait_for_peers(deadline);
        let hooks = broker.wait_for_hooks(deadline);
        if left + hooks > 0 {
            tracing::warn!(connections = left, hooks, "not everything ended in time");
        }
    }
}

/// A connection's share of the limit, given back on drop, or by [`Self::close`] once the socket is
/// closed.
pub(super) struct ConnectionSlot {
    entry: Entry,
    _used: QuotaUse,
}

/// A connection's entry in the list of those that are ended with the broker.
struct Entry {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
}

/// What a connection takes of the quota, given back on drop.
struct QuotaUse {
    shared: Arc<Shared>,
    uid: u32,
}

impl ConnectionSlot {
    pub(super) fn take(shared: &Arc<Shared>, peer: &Arc<Peer>) -> Result<Self, QuotaError> {
        let (shared, peer) = (Arc::clone(shared), Arc::clone(peer));
        let mut connections = shared.lock();
        connections.quota.take(peer.credentials())?;
        connections.peers.insert(peer.number(), Arc::clone(&peer));
        drop(connections);
        let used = QuotaUse { shared: Arc::clone(&shared), uid: peer.credentials().uid };
        Ok(Self { entry: Entry { shared, peer }, _used: used })
    }

    pub(super) fn service(&self) -> &Arc<Service> {
        &self.entry.shared.service
    }

    pub(super) fn peer(&self) -> &Arc<Peer> {
        &self.entry.peer
    }

    /// Ends a connection that is served no more: closes its socket, which may block for as long as
    /// the peer likes, and gives its share back then. To be called by its own thread.
    pub(super) fn close(self) {
        let Self { entry, _used } = self;
        let peer = Arc::clone(&entry.peer);
        drop(entry);
        peer.close();
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.shared.lock().peers.remove(&self.peer.number());
        self.shared.ended.notify_all();
    }
}

impl Drop for QuotaUse {
    fn drop(&mut self) {
        self.shared.lock().quota.give_back(self.uid);
    }
}

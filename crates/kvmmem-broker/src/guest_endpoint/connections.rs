// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest endpoint's connections, and how many there may be.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::net::Shutdown;

use crate::sync::{lock, wait_while};

/// The most connections at a time.
pub(super) const MAX_CONNECTIONS: usize = 512;

/// The most of one VM.
pub(super) const MAX_PER_CID: usize = 64;

/// Who is connected.
#[derive(Debug, Default)]
pub(super) struct ConnectionLimit {
    list: Mutex<List>,
    /// Signalled when a slot is given back.
    given_back: Condvar,
}

#[derive(Debug, Default)]
struct List {
    taken: Vec<(u32, Arc<OwnedFd>)>,
    /// The endpoint is closed and accepts no connection.
    closed: bool,
}

/// A connection's slot, given back on drop.
#[derive(Debug)]
pub(super) struct Slot {
    limit: Arc<ConnectionLimit>,
    cid: u32,
    socket: Arc<OwnedFd>,
}

/// Why there is no slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoSlot {
    #[error("this VM has {MAX_PER_CID} views already, or asks for them: close some")]
    OfVm,
    #[error("this host has {MAX_CONNECTIONS} views of VMs already: close some")]
    AtAll,
    #[error("the broker ends")]
    Closed,
}

impl ConnectionLimit {
    /// Takes a slot for a VM's connection.
    pub(super) fn take(self: &Arc<Self>, cid: u32, socket: &Arc<OwnedFd>) -> Result<Slot, NoSlot> {
        let mut list = self.lock();
        if list.closed {
            return Err(NoSlot::Closed);
        }
        if list.taken.iter().filter(|(other, _)| *other == cid).count() >= MAX_PER_CID {
            return Err(NoSlot::OfVm);
        }
        if list.taken.len() >= MAX_CONNECTIONS {
            return Err(NoSlot::AtAll);
        }
        list.taken.push((cid, Arc::clone(socket)));
        Ok(Slot { limit: Arc::clone(self), cid, socket: Arc::clone(socket) })
    }

    /// Whether [`Self::close`] has begun, before it ends any connection.
    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Refuses new connections and ends all others. Waits for their end; returns how many are left.
    pub(super) fn close(&self, limit: Duration) -> usize {
        let mut list = self.lock();
        list.closed = true;
        for (_, socket) in &list.taken {
            // It fails only where the tool was faster.
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        }
        let deadline = Instant::now() + limit;
        wait_while(&self.given_back, list, deadline, |list| !list.taken.is_empty()).taken.len()
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        lock(&self.list)
    }
}

impl Slot {
    /// Context id of the VM.
    pub(super) fn cid(&self) -> u32 {
        self.cid
    }

    /// The connection.
    pub(super) fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.limit.lock().taken.retain(|(_, socket)| !Arc::ptr_eq(socket, &self.socket));
        self.limit.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn socket() -> Arc<OwnedFd> {
        Arc::new(UnixStream::pair().unwrap().0.into())
    }

    #[test]
    fn one_vm_cannot_take_the_slots_of_all() {
        let limit = Arc::new(ConnectionLimit::default());
        let mut taken: Vec<Slot> =
            (0..MAX_PER_CID).map(|_| limit.take(3, &socket()).unwrap()).collect();
        assert_eq!(limit.take(3, &socket()).unwrap_err(), NoSlot::OfVm);
        drop(taken.pop());
        taken.push(limit.take(3, &socket()).unwrap());
        let others =
            (MAX_PER_CID..MAX_CONNECTIONS).map(|n| 4 + u32::try_from(n / MAX_PER_CID).unwrap());
        taken.extend(others.map(|cid| limit.take(cid, &socket()).unwrap()));
        assert_eq!(limit.take(100, &socket()).unwrap_err(), NoSlot::AtAll);
        drop(taken);
        assert_eq!(limit.close(Duration::ZERO), 0);
        assert_eq!(limit.take(3, &socket()).unwrap_err(), NoSlot::Closed);
    }
}

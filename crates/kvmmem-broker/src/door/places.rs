// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The door's connections, and how many there may be.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::Shutdown;

/// The most connections at a time: each has a thread.
pub(super) const MAX_CONNECTIONS: usize = 512;

/// The most of one VM.
pub(super) const MAX_PER_CID: usize = 64;

/// Who is connected.
#[derive(Debug, Default)]
pub(super) struct Places {
    list: Mutex<List>,
    /// Signalled when a place is given back.
    given_back: Condvar,
}

#[derive(Debug, Default)]
struct List {
    taken: Vec<(u32, Arc<OwnedFd>)>,
    /// The door is shut: nobody comes in any more.
    closed: bool,
}

/// A connection's place, given back on drop.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    cid: u32,
    socket: Arc<OwnedFd>,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoPlace {
    #[error("this VM has {MAX_PER_CID} views already, or asks for them: close some")]
    OfVm,
    #[error("this host has {MAX_CONNECTIONS} views of VMs already: close some")]
    AtAll,
    #[error("the broker ends")]
    Closed,
}

impl Places {
    /// Takes a place for a VM's connection.
    pub(super) fn take(self: &Arc<Self>, cid: u32, socket: &Arc<OwnedFd>) -> Result<Place, NoPlace> {
        let mut list = self.lock();
        if list.closed {
            return Err(NoPlace::Closed);
        }
        if list.taken.iter().filter(|(other, _)| *other == cid).count() >= MAX_PER_CID {
            return Err(NoPlace::OfVm);
        }
        if list.taken.len() >= MAX_CONNECTIONS {
            return Err(NoPlace::AtAll);
        }
        list.taken.push((cid, Arc::clone(socket)));
        Ok(Place { places: Arc::clone(self), cid, socket: Arc::clone(socket) })
    }

    /// Lets nobody in any more, ends all connections, and waits for it; returns how many are left.
    pub(super) fn close(&self, limit: Duration) -> usize {
        let mut list = self.lock();
        list.closed = true;
        for (_, socket) in &list.taken {
            // It fails only where the tool was faster.
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        }
        let (list, _) = self
            .given_back
            .wait_timeout_while(list, limit, |list| !list.taken.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        list.taken.len()
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Context id of the VM.
    pub(super) fn cid(&self) -> u32 {
        self.cid
    }

    /// The connection.
    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().taken.retain(|(_, socket)| !Arc::ptr_eq(socket, &self.socket));
        self.places.given_back.notify_all();
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
    fn one_vm_cannot_take_the_places_of_all() {
        let places = Arc::new(Places::default());
        let mut taken: Vec<Place> = (0..MAX_PER_CID).map(|_| places.take(3, &socket()).unwrap()).collect();
        assert_eq!(places.take(3, &socket()).unwrap_err(), NoPlace::OfVm);
        drop(taken.pop());
        taken.push(places.take(3, &socket()).unwrap());
        let others = (MAX_PER_CID..MAX_CONNECTIONS).map(|n| 4 + u32::try_from(n / MAX_PER_CID).unwrap());
        taken.extend(others.map(|cid| places.take(cid, &socket()).unwrap()));
        assert_eq!(places.take(100, &socket()).unwrap_err(), NoPlace::AtAll);
        drop(taken);
        assert_eq!(places.close(Duration::ZERO), 0);
        assert_eq!(places.take(3, &socket()).unwrap_err(), NoPlace::Closed);
    }
}

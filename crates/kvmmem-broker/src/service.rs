// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The service: a broker, and what reaches beyond the connections of its peers. It watches the VMMs
//! of VMs that it has added, keeps introspectors under stock QEMUs, and connects hooks.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use kvmmem_qemu::monitors::Monitors;

use crate::broker::Broker;
use crate::core::limits::Limits;
use crate::external::watch::Watch;
use crate::guest_endpoint::GuestEndpoint;
use crate::guest_endpoint::introspectors::IntrospectorViews;
use crate::introspector::Introspector;
use crate::introspector::list::Introspectors;
use crate::reactor::Reactor;
use crate::sync::lock;
use crate::workers::Workers;

/// Threads that handle the ends of targets' VMMs, and of introspectors'.
const ENDS: usize = 2;

/// The most threads that ask VMMs.
const SERVICES: usize = 24;

/// The most threads that serve hooks.
const SESSIONS: usize = 48;

/// The most of either that work for one party.
const SHARE: usize = 4;

/// A broker with its threads.
#[derive(Debug)]
pub struct Service {
    broker: Arc<Broker>,
    reactor: Reactor,
    /// For what follows from the ends of VMMs.
    ends: Workers,
    /// For what asks VMMs, and may take seconds.
    services: Workers,
    /// For the hooks' connections.
    sessions: Workers,
    /// The VMMs of the VMs that were added.
    external: Watch,
    /// Held while a VM is added whose RAM must be no other target's. Taken before the broker's
    /// lock.
    adding: Mutex<()>,
    introspectors: Arc<Introspectors>,
    guest_endpoint: GuestEndpoint,
    /// The QMP connections that last.
    monitors: Monitors,
}

impl Default for Service {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl Service {
    /// A service that knows no VM.
    pub(crate) fn new(limits: Limits) -> Self {
        let reactor = Reactor::default();
        let ends = Workers::new(&reactor, "vmm-watch", ENDS, ENDS);
        Self {
            broker: Arc::new(Broker::new(limits)),
            services: Workers::new(&reactor, "service", SERVICES, SHARE),
            sessions: Workers::new(&reactor, "session", SESSIONS, SHARE),
            external: Watch::new(&reactor, &ends),
            adding: Mutex::default(),
            introspectors: Arc::default(),
            guest_endpoint: GuestEndpoint::default(),
            monitors: Monitors::default(),
            ends,
            reactor,
        }
    }

    /// The broker.
    pub fn broker(&self) -> &Arc<Broker> {
        &self.broker
    }

    pub(crate) fn reactor(&self) -> &Reactor {
        &self.reactor
    }

    /// The threads that ask VMMs.
    pub(crate) fn services(&self) -> &Workers {
        &self.services
    }

    /// The threads that serve hooks.
    pub(crate) fn sessions(&self) -> &Workers {
        &self.sessions
    }

    pub(crate) fn external(&self) -> &Watch {
        &self.external
    }

    pub(crate) fn adding(&self) -> MutexGuard<'_, ()> {
        lock(&self.adding)
    }

    /// The introspectors under stock QEMUs.
    pub(crate) fn introspectors(&self) -> &Arc<Introspectors> {
        &self.introspectors
    }

    /// The introspector under a stock QEMU that has a vsock context id.
    pub fn introspector(&self, cid: u32) -> Option<Arc<Introspector>> {
        self.introspectors.by_cid(cid)
    }

    pub(crate) fn guest_endpoint(&self) -> &GuestEndpoint {
        &self.guest_endpoint
    }

    /// Says at which vsock port the guest endpoint listens, `None` for never. Has no effect on an
    /// endpoint that is open.
    pub fn set_guest_port(&self, port: Option<u32>) {
        self.guest_endpoint.set_port(port);
    }

    /// Opens the guest endpoint unless it is open.
    ///
    /// # Errors
    /// Where it cannot listen.
    pub(crate) fn open_guest_endpoint(&self) -> io::Result<()> {
        let views = IntrospectorViews {
            broker: Arc::downgrade(&self.broker),
            introspectors: Arc::downgrade(&self.introspectors),
        };
        self.guest_endpoint.open(&self.reactor, views)
    }

    /// The QMP connections that last, for all who use them.
    pub(crate) fn monitors(&self) -> &Monitors {
        &self.monitors
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It needs the reactor for its own end.
        self.guest_endpoint.close();
        self.reactor.end();
        self.ends.end();
        self.services.end();
        self.sessions.end();
    }
}

#[cfg(test)]
mod tests {
    use super::{ENDS, SERVICES, SESSIONS};
    use crate::core::limits::MAX_CONNECTIONS;
    use crate::{guest_endpoint, introspector};

    #[test]
    fn at_the_limits_there_are_2727_threads() {
        // The main thread, the reactor, and those of refused connections, of the audit log and of
        // the VMs of the broker before.
        const SINGLE: usize = 5;
        let pools = ENDS + SERVICES + SESSIONS + guest_endpoint::WORKERS;
        let threads = SINGLE + pools + MAX_CONNECTIONS + introspector::list::MAX;
        // docs/reference/limits.md has this number.
        assert_eq!(threads, 2727);
    }
}

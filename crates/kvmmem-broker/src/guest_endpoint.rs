// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest endpoint: where a tool in a VM under a stock QEMU has its view opened, over vsock.
//!
//! Such a VM has no VMM of ours to which a hypercall could bring a token, so its tool asks the host
//! itself: it connects to context id 2, port [`GUEST_PORT`](kvmmem_proto::guest::GUEST_PORT), and
//! sends one [`FromTool::Open`](kvmmem_proto::guest::FromTool::Open). The broker tells by the
//! peer's context id which introspector asks, plugs the view's devices into it, and answers. From
//! then on both are silent: the connection stands for the view, and its end is the view's.

mod connections;
pub(crate) mod introspectors;
mod listen;
mod serve;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvmmem_proto::guest::GUEST_PORT;
use vsock::{VMADDR_CID_ANY, VsockListener};

use connections::ConnectionLimit;
use listen::{Accept, listen};
use serve::{Shared, Views};

use crate::reactor::{Reactor, Token};
use crate::sync::lock;
use crate::workers::Workers;

/// The most threads that open and close views, and those of one VM.
pub(crate) const WORKERS: usize = 24;
const SHARE: usize = 8;

/// How long the end of all connections, and with them of their views, is waited for.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

/// The endpoint: opened when the first introspector is added.
#[derive(Debug)]
pub(crate) struct GuestEndpoint(Mutex<State>);

#[derive(Debug)]
enum State {
    /// Opened at this port when it is needed; `None` for never.
    Closed(Option<u32>),
    Open(#[allow(dead_code, reason = "kept until it is dropped")] Listening),
}

impl Default for GuestEndpoint {
    fn default() -> Self {
        Self(Mutex::new(State::Closed(Some(GUEST_PORT))))
    }
}

impl GuestEndpoint {
    /// Says at which vsock port it listens, `None` for never. Has no effect on one that is open.
    pub(crate) fn set_port(&self, port: Option<u32>) {
        let mut state = lock(&self.0);
        if matches!(*state, State::Closed(_)) {
            *state = State::Closed(port);
        }
    }

    /// Opens it unless it is open.
    ///
    /// # Errors
    /// Where the kernel has no vsock, the port is taken, or no thread can be started.
    pub(crate) fn open(&self, reactor: &Reactor, views: impl Views) -> io::Result<()> {
        let mut state = lock(&self.0);
        if let State::Closed(Some(port)) = *state {
            *state = State::Open(Listening::start(reactor, port, views)?);
        }
        Ok(())
    }

    /// Closes it for good, and with it all its connections and views.
    pub(crate) fn close(&self) {
        let open = std::mem::replace(&mut *lock(&self.0), State::Closed(None));
        drop(open);
    }
}

/// The listening socket. Dropping it ends all connections and their views.
#[derive(Debug)]
struct Listening {
    reactor: Reactor,
    /// Accepts connections.
    token: Token,
    workers: Workers,
    limit: Arc<ConnectionLimit>,
}

impl Listening {
    /// Listens at a vsock port, for all VMs of this host.
    ///
    /// # Errors
    /// Where the kernel has no vsock, the port is taken, or no thread can be started.
    fn start(reactor: &Reactor, port: u32, views: impl Views) -> io::Result<Self> {
        let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
        // A tool that is gone before it is accepted must not be waited for.
        listener.set_nonblocking(true)?;
        Self::open(reactor, listener, views)
    }

    fn open(reactor: &Reactor, acceptor: impl Accept, views: impl Views) -> io::Result<Self> {
        let limit = Arc::new(ConnectionLimit::default());
        let workers = Workers::new(reactor, "guest", WORKERS, SHARE);
        workers.start()?;
        let shared = Shared {
            reactor: reactor.clone(),
            workers: workers.clone(),
            limit: Arc::clone(&limit),
            views,
        };
        let token = listen(acceptor, &Arc::new(shared)).inspect_err(|_| workers.end())?;
        Ok(Self { reactor: reactor.clone(), token, workers, limit })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.reactor.remove(self.token);
        let left = self.limit.close(SHUTDOWN_LIMIT);
        if left > 0 {
            tracing::warn!(
                connections = left,
                "not every view of the guest endpoint ended in time"
            );
        }
        self.workers.end();
    }
}

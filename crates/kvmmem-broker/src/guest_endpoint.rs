// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest endpoint: where a tool in a VM under a stock QEMU has its view opened, over vsock.
//!
//! Such a VM has no VMM of ours to which a hypercall could bring a token, so its tool asks the host
//! itself: it connects to context id 2, port [`GUEST_PORT`](kvmmem_proto::guest::GUEST_PORT), and
//! sends one [`FromTool::Open`](kvmmem_proto::guest::FromTool::Open). The broker tells by the
//! peer's context id which introspector asks, plugs the view's devices into it, and answers. From
//! then on both are silent: the connection stands for the view, and its end is the view's.

mod connections;
mod introspectors;
mod listen;
mod serve;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vsock::{VMADDR_CID_ANY, VsockListener};

use connections::ConnectionLimit;
use introspectors::Introspectors;
use listen::Accept;
use serve::Views;

use crate::broker::Broker;

/// How long the end of all connections, and with them of their views, is waited for.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

/// The listening endpoint. Dropping it ends all connections and their views.
#[derive(Debug)]
pub struct GuestEndpoint {
    limit: Arc<ConnectionLimit>,
    /// Written to, it ends the thread that accepts.
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl GuestEndpoint {
    /// Listens at a vsock port, for all VMs of this host.
    ///
    /// # Errors
    /// Where the kernel has no vsock, the port is taken, or no thread can be started.
    pub fn start(broker: &Arc<Broker>, port: u32) -> io::Result<Self> {
        let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
        // A tool that is gone before it is accepted must not be waited for.
        listener.set_nonblocking(true)?;
        Self::open(listener, Introspectors(Arc::downgrade(broker)))
    }

    fn open(acceptor: impl Accept, views: impl Views) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let limit = Arc::new(ConnectionLimit::default());
        let thread = std::thread::Builder::new().name("endpoint".into()).spawn({
            let (limit, stop) = (Arc::clone(&limit), Arc::clone(&stop));
            move || listen::accept_until(stop.as_fd(), &acceptor, &limit, &Arc::new(views))
        })?;
        Ok(Self { limit, stop, thread: Some(thread) })
    }
}

impl Drop for GuestEndpoint {
    fn drop(&mut self) {
        // It fails only where the counter is full.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            // It may be this thread that held the broker's last reference.
            && thread.thread().id() != std::thread::current().id()
        {
            // The thread does not panic; were it to, there would be nothing left to end.
            let _ = thread.join();
        }
        let left = self.limit.close(SHUTDOWN_LIMIT);
        if left > 0 {
            tracing::warn!(
                connections = left,
                "not every view of the guest endpoint ended in time"
            );
        }
    }
}

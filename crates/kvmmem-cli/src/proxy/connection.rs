// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A tool's connection: what its threads share, and the view that it has until its end.
//!
//! A tool can send any open file beside a packet, and closing one may block for as long as the tool
//! likes: a file of a FUSE file system, a TCP socket with `SO_LINGER`. So no thread of a connection
//! is waited for without a limit, and the view's end needs none of them.

use std::sync::{Arc, PoisonError, RwLock};

use kvmmem::View;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::packet::PacketSocket;

use super::connection_limit::ToolSlot;

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: PacketSocket,
    pub(super) credentials: Credentials,
    pub(super) slot: Arc<ToolSlot>,
    /// Held for reading while the view is used.
    view: RwLock<Slot>,
}

/// The view of a connection.
#[derive(Debug)]
enum Slot {
    Waiting,
    Open(View),
    Ended,
}

impl Connection {
    pub(super) fn new(socket: PacketSocket, credentials: Credentials) -> Self {
        let slot = Arc::new(ToolSlot::of(credentials.uid));
        Self { socket, credentials, slot, view: RwLock::new(Slot::Waiting) }
    }

    /// Takes the view that was opened; it ends at once if the connection has.
    pub(super) fn open(&self, view: View) {
        let mut slot = self.view.write().unwrap_or_else(PoisonError::into_inner);
        if matches!(*slot, Slot::Waiting) {
            *slot = Slot::Open(view);
        }
    }

    /// Uses the view; `None` before the view is open and after its end.
    pub(super) fn with_view<T>(&self, act: impl FnOnce(&View) -> T) -> Option<T> {
        match &*self.view.read().unwrap_or_else(PoisonError::into_inner) {
            Slot::Open(view) => Some(act(view)),
            Slot::Waiting | Slot::Ended => None,
        }
    }

    /// Ends the connection, and its view after the use that is under way.
    pub(super) fn end(&self) {
        self.socket.shut_down();
        let mut slot = self.view.write().unwrap_or_else(PoisonError::into_inner);
        *slot = Slot::Ended;
    }
}

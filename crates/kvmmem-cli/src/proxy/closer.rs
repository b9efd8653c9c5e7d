// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that closes the connections of tools that have no thread of their own: those that
//! were refused.
//!
//! A packet that was not received may hold a file whose last close blocks, such as a TCP socket
//! with `SO_LINGER`, and each member of the group may be refused as often as it likes. So there is
//! one thread for all: the others wait, and hold a file descriptor each.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use super::connection::Connection;

/// Starts its thread with the first connection. Once this is dropped, the thread ends with the last
/// one.
#[derive(Default)]
pub(super) struct Closer(Option<Sender<Arc<Connection>>>);

impl Closer {
    /// Closes a connection on the thread; on this one where none can be started.
    pub(super) fn close(&mut self, connection: Arc<Connection>) {
        if self.0.is_none() {
            let (sender, connections) = channel::<Arc<Connection>>();
            let thread = std::thread::Builder::new().name("close-refused".into());
            let started = thread.spawn(move || connections.into_iter().for_each(drop));
            self.0 = started.ok().map(|_| sender);
        }
        if let Some(sender) = &self.0 {
            // The thread ends with the sender.
            let _ = sender.send(connection);
        }
    }
}

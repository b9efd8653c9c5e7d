// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that closes connections which were refused.
//!
//! A packet that was not received may hold a file whose last close blocks, such as a TCP socket
//! with `SO_LINGER`. One thread for all: the others wait, and hold a file descriptor each.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use crate::peer::Peer;
use crate::sync::lock;

/// The thread's stack, bytes.
const STACK: usize = 64 << 10;

/// Starts its thread with the first connection.
#[derive(Debug, Default)]
pub(super) struct Closer(Mutex<Option<Sender<Arc<Peer>>>>);

impl Closer {
    /// Closes a connection on the thread; on this one where none can be started.
    pub(super) fn close(&self, peer: Arc<Peer>) {
        let mut thread = lock(&self.0);
        if thread.is_none() {
            let (sender, peers) = channel::<Arc<Peer>>();
            let builder = std::thread::Builder::new().name("close".into()).stack_size(STACK);
            *thread = builder.spawn(move || peers.into_iter().for_each(drop)).ok().map(|_| sender);
        }
        if let Some(sender) = thread.as_ref() {
            // The thread ends with the sender.
            let _ = sender.send(peer);
        }
    }
}

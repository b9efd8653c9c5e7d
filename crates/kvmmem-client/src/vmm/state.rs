// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the callers and the threads of a [`super::VmmLink`] share.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kvmmem_proto::message::{Answer, Call, Registration};
use kvmmem_proto::packet::PacketSocket;

use super::cache::Cache;
use super::error::RedeemError;
use super::events::Queue;
use super::outbox::Outbox;
use super::vcpus::Questions;
use super::views::Views;

/// Where the broker is, and how far the link is.
#[derive(Debug)]
pub(super) struct Shared {
    /// Where the broker listens.
    pub(super) path: PathBuf,
    pub(super) files: Vec<OwnedFd>,
    pub(super) state: Mutex<State>,
    /// Signalled when an answer has come, the connection has ended, something waits in
    /// [`State::events`], or the link is dropped.
    pub(super) changed: Condvar,
    /// Calls that are not answered, in their order.
    pub(super) outbox: Outbox,
}

#[derive(Debug)]
pub(super) struct State {
    /// Said again to each broker.
    pub(super) registration: Registration,
    /// The generation with which the VM was registered first; each of `changes` counts one more.
    pub(super) first_generation: Option<u64>,
    /// How often its RAM has changed.
    pub(super) changes: u64,
    /// `None` while there is no registered connection.
    pub(super) socket: Option<Arc<PacketSocket>>,
    pub(super) cache: Cache,
    pub(super) views: Views,
    pub(super) events: Queue,
    pub(super) vcpus: Questions,
    /// Connections that have ended.
    pub(super) lost: u64,
    pub(super) last_request: u64,
    /// Requests under way, and their answers once they have come.
    pub(super) waiting: HashMap<u64, Option<Result<Answer, RedeemError>>>,
    pub(super) stopped: bool,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Confirms that nothing of this VM reaches memory by a grant any more.
    pub(super) fn revoked(&self, grant: u64) {
        self.outbox.push(Call::RevokedDone { grant });
        self.flush();
    }

    /// Sends the calls that wait; what the broker does not take now, the reader's thread tries
    /// again.
    pub(super) fn flush(&self) {
        let socket = self.lock().socket.clone();
        if let Some(socket) = socket {
            self.outbox.flush(&socket, None);
        }
    }
}

impl State {
    /// A number for a request that will be waited for.
    pub(super) fn begin_request(&mut self) -> u64 {
        self.last_request += 1;
        self.waiting.insert(self.last_request, None);
        self.last_request
    }
}
